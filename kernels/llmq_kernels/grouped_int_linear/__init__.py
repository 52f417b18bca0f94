"""`torch.ops.llmq.grouped_int_linear`: rows routed to experts, by stacked integer weights."""
