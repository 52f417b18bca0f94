"""Finished folders in the formats of other programs: GGUF, MLX, GPTQ, AWQ, or dense."""
