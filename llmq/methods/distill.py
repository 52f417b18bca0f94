"""Distillation of scales: codes fixed, scales and norms trained end to end towards the unquantized model's logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.methods.base import Method, Student, Tuned

# One batch in HELD_OUT is held out to choose the best iterate, and to decide whether anything is kept.
HELD_OUT = 8
# Adam's decay rates; an epsilon that is small beside any gradient.
BETAS, EPSILON = (0.9, 0.99), 1e-15
# The held-out loss is looked at every LOOK steps; training ends when it has not fallen for PATIENCE looks.
LOOK, PATIENCE = 10, 3
SLOWER = 0.3
"""What the rate is multiplied by when the held-out loss has not fallen."""
BEST = "best."
# Blocks stay in memory while they are trained, if all of them take no more bytes than this as they are read.
KEPT = 1 << 30


class Distill(Method):
    """Trains the scales and norms of the whole quantized model, codes fixed, by the KL of its logits to the unquantized
    model's.

    steps: of Adam, with a rate that rises for the first ten and then falls to 0; learning_rate: the largest, as a
    fraction of a scale per step; minibatch: calibration windows per step, in whole batches.
    """

    def __init__(self, *, steps: int = 60, learning_rate: float = 6e-3, minibatch: int = 4, seed: int = 0) -> None:
        if steps < 1 or minibatch < 1:
            raise LlmqError(f"steps and minibatch must be 1 or more, not {steps!r} and {minibatch!r}")
        if not 0 < learning_rate < 1:
            raise LlmqError(f"learning-rate must lie between 0 and 1, not {learning_rate!r}")
        self.steps, self.learning_rate, self.minibatch, self.seed = steps, learning_rate, minibatch, seed

    def tune(self, student: Student) -> Tuned:
        """See `Method.tune`. Keeps the iterate with the least loss on held-out batches; this may be the start."""
        held, train = self.split(student.batches)
        parameters = dict(student.parameters)
        best = {name: value.detach().clone() for name, value in parameters.items()}
        optimizer = torch.optim.Adam(
            [*parameters.values()], self.learning_rate, betas=BETAS, eps=EPSILON, foreach=False
        )
        values: dict[str, Tensor] = {**parameters, **{BEST + name: value for name, value in best.items()}}
        about = student.load(values, optimizer)
        if about is None:
            first = student.loss(held)
            about = {"step": 0, "before": first, "after": first, "at": 0, "share": 1.0}
            student.save(values, optimizer, about)
        about.setdefault("share", 1.0)  # a run that an earlier version began has none
        for _ in range(about["step"]):
            student.progress("was already done")
        size = max(1, self.minibatch // student.windows)
        while about["step"] < self.steps and about["step"] - about["at"] < LOOK * PATIENCE:
            step = about["step"]
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step) * about["share"]
            loss = student.descend(self.taken(train, step, size), lambda: self._step(optimizer))
            about["step"] = step + 1
            if about["step"] % LOOK == 0 or about["step"] == self.steps:
                now = student.loss(held)
                if now < about["after"]:
                    about |= {"after": now, "at": about["step"]}
                    for name, value in best.items():
                        value.copy_(parameters[name].detach())
                else:
                    # The rate was too large for what is left to gain: from the best again, more slowly.
                    about["share"] *= SLOWER
                    for name, value in best.items():
                        parameters[name].data.copy_(value)
                student.save(values, optimizer, about)
            student.progress(f"KL {loss:.4f}, held out {about['before']:.4f} → {about['after']:.4f}")
        for name, value in best.items():
            parameters[name].data.copy_(value)
        return Tuned(about["before"], about["after"], about["step"], about["at"])

    def split(self, batches: int) -> tuple[list[int], list[int]]:
        """The batches that are held out, and those that are trained on."""
        order = torch.randperm(batches, generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = math.ceil(batches / HELD_OUT)
        return sorted(order[:count]), sorted(order[count:])

    def taken(self, train: list[int], step: int, size: int) -> list[int]:
        """The batches of a step: each epoch goes through all of them in an order of its own."""
        size = min(size, len(train))
        epochs: dict[int, list[int]] = {}
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(train))
            if epoch not in epochs:
                chance = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
                epochs[epoch] = torch.randperm(len(train), generator=chance).tolist()
            chosen.append(train[epochs[epoch][place]])
        return chosen

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a rise over ten steps, or a quarter of them, then down to 0."""
        rise = min(10, math.ceil(self.steps / 4))
        share = (step + 1) / rise if step < rise else (self.steps - step) / max(1, self.steps - rise)
        return self.learning_rate * share

    def refusal(self, scheme: Scheme) -> str | None:
        """See `Method.refusal`: scales must be able to move."""
        if scheme.double_quant or scheme.rules.span:
            return f"it trains scales, and those of {scheme} are quantized themselves and cannot move"
        return None

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def workspace(self, shape: tuple[int, ...]) -> int:
        """None: while a block is quantized, nothing is trained."""
        return 0


def read_bytes(blocks: Iterable[Any], dtype: torch.dtype) -> int:
    """The bytes of blocks of a plan as they are read: a byte for each code, and all other parameters in the dtype."""
    return sum(
        parameter.numel() * (1 if name in block.weights else dtype.itemsize)
        for block in blocks
        for name, parameter in block.module.named_parameters()
    )
