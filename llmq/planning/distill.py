"""What is checked and predicted of a method that tunes the whole model after all blocks are written."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

import psutil

from llmq import ranks
from llmq.discovery.tail import PIECE, Tail, find_tail
from llmq.errors import LlmqError
from llmq.methods.distill import HELD_OUT, KEPT, read_bytes
from llmq.planning.memory import TRANSIENT, Budget
from llmq.planning.types import Plan

FACTOR_BYTES = 32
"""Of a factor: itself, its gradient, two moments and the best value; and all of these once more when a run resumes."""
BACKWARD_COPIES = 16
"""Of what a block computes for a batch, at its widest, in the model's dtype: what its backward pass needs."""
LOGIT_COPIES = 7
"""Of the logits that are computed at once, in float32: of two models, their logarithms, and gradients."""


def check_tuning(plan: Plan) -> Tail | None:
    """The model's tail, if a method tunes the whole; None else.

    Raises LlmqError if it could not: experts are streamed, scales cannot move, there are too few windows to hold some
    out, or the model returns no logits.
    """
    tuner = plan.pipeline.tuner
    if tuner is None:
        return None
    name, recipe = plan.recipe.methods[-1], "+".join(plan.recipe.methods)
    without = f"leave {name} out (--method {'+'.join(plan.recipe.methods[:-1]) or 'gptq'})"
    mixture = next((block for block in plan.blocks if block.experts is not None or block.parts is not None), None)
    if mixture is not None:
        raise LlmqError(
            f"method {recipe!r}: {name} trains whole blocks, but the routed experts of {mixture.name} are quantized a "
            f"few at a time: {without}, or --keep the experts"
        )
    for scheme in sorted({w.scheme for w in plan.weights if w.scheme is not None and w.block is not None}, key=str):
        if reason := tuner.refusal(scheme):
            raise LlmqError(f"method {recipe!r}: {reason}; {without}, or choose another scheme")
    if len(plan.ids) <= plan.batch:
        raise LlmqError(
            f"method {recipe!r}: {name} holds windows out to judge itself, and the {len(plan.ids)} windows are one "
            f"batch: give at least {plan.batch + 1} --samples; 128 or more measure well"
        )
    try:
        return find_tail(plan.model, [block.module for block in plan.blocks])
    except LlmqError as problem:
        raise LlmqError(f"{plan.source.folder}: {problem}; {without}") from problem


def of_rank(plan: Plan, windows: int) -> int:
    """Of some windows, in whole batches, the most that one rank runs."""
    return plan.batch * ceil(ceil(windows / plan.batch) / ranks.size())


def with_tuning(plan: Plan, tail: Tail, found: Budget, between: int | None, device: str) -> Budget:
    """A run's budget if a method tunes the whole model at its end. found: without; between: as `predict` has it."""
    size, (samples, tokens) = plan.dtype.itemsize, plan.ids.shape
    width = tail.width
    between = between or tokens * width * size
    # What the first block gets is kept from the start.
    first = min(samples, of_rank(plan, samples)) * between
    minibatch = of_rank(plan, getattr(plan.pipeline.tuner, "minibatch", 1))
    held = of_rank(plan, plan.batch * ceil(ceil(samples / plan.batch) / HELD_OUT))
    # Of what is lent to a rank, it has what the first block gets and the unquantized model's last states.
    lent = 2 if ranks.size() > 1 else 0
    states = 2 * first + max((len(plan.blocks) + 3 + lent) * minibatch, (2 + lent) * held) * between
    factors = [
        sum(i.shape[0] * (i.shape[1] // (i.scheme.group_size or i.shape[1])) for i in mine if i.scheme is not None)
        for mine in (block.weights.values() for block in plan.blocks)
    ]
    read = read_bytes(plan.blocks, plan.dtype)
    names = {f"{b.name}.{n}" for b in plan.blocks for n, _ in b.module.named_parameters()}
    widest = max(max(p.shape) for n, p in plan.model.named_parameters() if n in names and p.dim() > 1)
    backward = BACKWARD_COPIES * plan.batch * tokens * widest * max(2, size)
    blocks = [sum(p.numel() for p in block.module.parameters()) for block in plan.blocks]
    quantized = [sum(prod(w.shape) for w in block.weights.values()) for block in plan.blocks]
    # A block, the gradients of its weights, and its codes, where they are not kept there.
    kept = device == "cpu" and read <= KEPT
    block = max((all_ + mine) * size + (0 if kept else mine) for all_, mine in zip(blocks, quantized, strict=True))
    outside = sum(plan.model.get_parameter(name).numel() for name in tail.parameters) * size
    logits = LOGIT_COPIES * 4 * min(max(PIECE, tail.rows * plan.batch), plan.batch * tokens * tail.rows)
    # Each batch has its gradients of a block's factors, until they are added.
    slopes = 4 * max(factors) * minibatch // plan.batch
    host = states + FACTOR_BYTES * sum(factors) + slopes + (read if read <= KEPT else 0)
    work = outside + max(block + backward, logits)
    now = psutil.Process().memory_info().rss + TRANSIENT
    if device == "cpu":
        return replace(found, memory=max(found.memory + first, now + host + work))
    memory = max(found.memory + first, now + host + block)
    return replace(found, memory=memory, device_memory=max(found.device_memory, work))
