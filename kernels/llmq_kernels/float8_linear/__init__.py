"""`torch.ops.llmq.float8_linear`: weights and inputs in float8_e4m3fn."""
