"""`torch.ops.llmq.vectors_linear`: bytes that select vectors."""
