"""`torch.ops.llmq.codebook_linear`: 4-bit codes of codebooks on a GPU."""
