"""The main loop: one block at a time is read, quantized and written. Read stream.py first."""
