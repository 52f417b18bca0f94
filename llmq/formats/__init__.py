"""One file each: the bytes that a quantized weight is on disk, and nothing else."""
