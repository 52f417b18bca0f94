"""`torch.ops.llmq.int_linear`: integer weights."""
