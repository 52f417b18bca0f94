"""`torch.ops.llmq.levels_linear`: a codebook for each row."""
