"""Functions for a training run's steps: learning rate, rows of each step, padding, loss, optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.data.instructions import Example
from llmq.errors import LlmqError, first_line
from llmq.machine import require

IGNORED = -100
SORTED = 16
"""The number of steps whose rows are sorted by length together, so that there is little padding."""


def rate(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate of a step, counted from 0: a linear rise, then constant or down to 0 by the schedule."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]
    return peak * share


def steps_of(rows: Sequence[Example], size: int, epoch: int, seed: int) -> list[list[Example]]:
    """The rows of each step of an epoch: shuffled, sorted by length within a few steps, and then the steps shuffled."""
    chance = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=chance).tolist()
    steps = []
    for start in range(0, len(order), size * SORTED):
        near = sorted(order[start : start + size * SORTED], key=lambda i: len(rows[i].ids))
        steps += [near[i : i + size] for i in range(0, len(near), size)]
    return [[rows[i] for i in steps[j]] for j in torch.randperm(len(steps), generator=chance).tolist()]


def padded(rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and targets, int64 [rows, longest]; targets without a loss are −100.

    Padding is on the right and never a target; in a causal model no other position attends to it, so no mask is needed.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        targets[i, : len(row.ids)] = torch.tensor(row.ids).where(torch.tensor(row.learn), IGNORED)
    return ids, targets


def loss_of(model: nn.Module, rows: Sequence[Example], device: torch.device | str) -> tuple[Tensor, int]:
    """The summed loss over a batch's learned tokens, float32, in nats, and their number."""
    ids, targets = (t.to(device) for t in padded(rows))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = targets[:, 1:]
    learned = wanted != IGNORED
    loss = nn.functional.cross_entropy(logits[learned].float(), wanted[learned], reduction="sum")
    return loss, int(learned.sum())


def held_out_loss(model: nn.Module, rows: Sequence[Example], batch: int, device: torch.device | str) -> float:
    """The loss in nats per learned token over all rows, with the model in evaluation mode."""
    mode(model, False)
    total, count = 0.0, 0
    with torch.no_grad():
        for part in split(sorted(rows, key=lambda row: len(row.ids)), batch):
            loss, tokens = loss_of(model, part, device)
            total, count = total + float(loss), count + tokens
    mode(model, True)
    return total / max(1, count)


def split(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """`size` rows at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def mode(model: nn.Module, training: bool) -> None:
    """Switch dropout on or off. 4-bit modules always stay in training mode: in evaluation mode bitsandbytes may repack
    them for the CPU, and its backward pass cannot read that layout; the mode has no other effect on them.
    """
    model.train(training)
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.training = True


def make_optimizer(
    kind: str, parameters: list[nn.Parameter], lr: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW with 8-bit state if it runs (tried on one parameter), else torch's; and its name, with the reason.

    Raises LlmqError if bitsandbytes' AdamW was requested by name and does not run.
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    why = ""
    if kind != "torch":
        try:
            optim = require("bitsandbytes", "8-bit AdamW").optim
            paged = kind == "paged" or (kind == "auto" and parameters[0].is_cuda)
            made = optim.PagedAdamW8bit if paged else optim.AdamW8bit
            probe = nn.Parameter(torch.zeros(64, 128, device=parameters[0].device))
            probe.grad = torch.ones_like(probe)
            made([probe]).step()
            optimizer: torch.optim.Optimizer = made(parameters, **options)
            return optimizer, f"bitsandbytes {made.__name__}"
        except (LlmqError, RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
            if kind != "auto":
                raise LlmqError(f"--optimizer {kind} does not run here ({first_line(error)}): use torch") from error
            why = f" (bitsandbytes' 8-bit AdamW does not run here: {first_line(error)})"
    return torch.optim.AdamW(parameters, **options), "torch AdamW" + why
