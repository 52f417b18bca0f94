"""bitsandbytes' 4-bit formats on disk: written and read."""
