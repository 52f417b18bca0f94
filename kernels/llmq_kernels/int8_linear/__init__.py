"""`torch.ops.llmq.int8_linear`: 8-bit weights and inputs."""
