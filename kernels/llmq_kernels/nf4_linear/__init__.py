"""`torch.ops.llmq.nf4_linear`: NF4 and FP4."""
