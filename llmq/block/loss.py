"""How far a block's output is from its target: relative errors, and the divergence of the logits that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmq import ranks
from llmq.machine import by_rows
from llmq.spill import Saving, rest

CHUNK = 1 << 18
# Lower bound of a token's size in the loss, as a fraction of the mean size.
FLOOR = 0.01
LOGITS = 1 << 22
"""Logits at a time: a chunk's take this many float32 numbers, a few times over."""


def relative_error(values: Iterable[Tensor], targets: Iterable[Tensor], *, batches: bool = False) -> float:
    """‖values − targets‖ / ‖targets‖ over all tensors, computed a few rows at a time.

    batches: whether there is one tensor for each batch, so that those of all ranks count.
    """
    found = [_squares(value, target) for value, target in zip(values, targets, strict=True)]
    rest(Saving.STATES)
    apart = whole = 0.0
    for squares in ranks.gather(found) if batches else found:
        for one, other in squares:
            apart += one
            whole += other
    return math.sqrt(apart / whole) if whole else math.sqrt(apart)


def _squares(value: Tensor, target: Tensor) -> list[tuple[float, float]]:
    """‖value − target‖² and ‖target‖² of some rows after the other."""
    rest(Saving.STATES)
    values, targets = value.flatten(), target.flatten()

    def work(some: slice) -> tuple[float, float]:
        exact = targets[some].to(value.device, torch.float32)
        apart, whole = torch.linalg.vector_norm(values[some].float() - exact), torch.linalg.vector_norm(exact)
        return float(apart) ** 2, float(whole) ** 2

    return by_rows(len(values), CHUNK, work, value.device)


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of an output's squared error [..., tokens, width], relative to the target's mean square.

    Both any float; float32.
    """
    target = target.to(torch.float32)
    size = target.square().mean(-1)
    # Relative, as later norms divide each token by its size; the floor keeps tiny tokens from dominating.
    size += FLOOR * size.mean() + torch.finfo(torch.float32).tiny
    return ((output.to(torch.float32) - target).square().mean(-1) / size).mean()


def chunk_of(vocabulary: int) -> int:
    """The tokens of a chunk."""
    return max(1, LOGITS // max(1, vocabulary))


def divergence(logits: Callable[[Tensor], Tensor], hidden: Tensor, wanted: Tensor, chunk: int) -> Tensor:
    """The mean over tokens of KL(logits(wanted) ‖ logits(hidden)) in nats, float32; gradients reach `hidden` only.

    logits: of hidden states [1, tokens, width], each token's on its own; hidden, wanted: [batch, tokens, width]; chunk:
    tokens at a time. The gradient is computed with the value, so that only one chunk's logits are in memory.
    """
    value: Tensor = _Divergence.apply(hidden, wanted, logits, chunk)  # type: ignore[no-untyped-call]
    return value


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, logits: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        rows, wants = hidden.reshape(1, -1, hidden.shape[-1]), wanted.reshape(1, -1, wanted.shape[-1])
        total, gradient = torch.zeros((), device=hidden.device), torch.zeros_like(rows)
        for start in range(0, rows.shape[1], chunk):
            part = slice(start, start + chunk)
            want = logits(wants[:, part]).float().log_softmax(-1)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                mine = rows[:, part].detach().requires_grad_(ctx.needs_input_grad[0])
                have = logits(mine).float().log_softmax(-1)
                loss = (want.exp() * (want - have)).sum() / rows.shape[1]
            if ctx.needs_input_grad[0]:
                (gradient[:, part],) = torch.autograd.grad(loss, mine)
            total += loss.detach()
        ctx.save_for_backward(gradient.view_as(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient), None, None, None
