"""What follows the last block, for methods that learn that block from the model's logits."""

from __future__ import annotations

from llmq.block.loss import LOGITS
from llmq.discovery.tail import find_tail
from llmq.errors import LlmqError
from llmq.planning.types import Plan

OWN = "the last block is learned from its own output, not from the logits"


def set_tail(plan: Plan) -> list[str]:
    """Find what follows the last block, if a refinement learns from the logits; returns why it cannot, as a warning.

    Experts of the last block are quantized after its other weights, each from its own output: they have none.
    """
    if not plan.blocks or not any(method.logits for method in plan.pipeline.refiners):
        return []
    last = plan.blocks[-1]
    if last.experts is not None or last.parts is not None:
        return [f"{OWN}: it has routed experts"]
    try:
        tail = find_tail(plan.model, [block.module for block in plan.blocks])
    except LlmqError as problem:
        return [f"{OWN}: {problem}"]
    if not tail.by_token:
        return [f"{OWN}: its hidden states are not of each token"]
    missing = [name for name in tail.parameters if not plan.links.tensors(name)]
    if missing:
        return [f"{OWN}: the checkpoint has no tensor for {missing[0]}"]
    plan.tail = tail
    return []


def tail_bytes(plan: Plan) -> tuple[int, int]:
    """What the tail takes while the last block is quantized, in bytes: its parameters, in float32, and a pass."""
    if plan.tail is None:
        return 0, 0
    numbers = [plan.model.get_parameter(name).numel() for name in plan.tail.parameters]
    # One of them is in the dtype of the model while it is read; of the logits, both models' and their gradients.
    return 4 * sum(numbers) + plan.dtype.itemsize * max(numbers, default=0), 4 * 8 * LOGITS
