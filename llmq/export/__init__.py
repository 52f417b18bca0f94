"""Finished folders in the formats of other programs: llama.cpp (GGUF), Apple's MLX, and older runtimes (GPTQ, AWQ)."""
