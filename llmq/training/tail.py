"""The tails of the quantized model and of the unquantized one, beside each other: their divergence and its slope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.discovery.parameters import assign, empty
from llmq.discovery.tail import Tail, find_tail, zeros_outside
from llmq.training.trained import IO, Norm, Reads

FLOOR = -1e30
"""Stands for the logarithm of 0 in a divergence."""


@dataclass
class TrainedTail:
    """What runs after the last block. ids: the windows, batch by batch; teacher: the unquantized model's last hidden
    states, of the batches that this rank has; norms, parameters: what is trained, as in the student; values: those
    parameters that differ between the two models whether they are trained or not: of the unquantized model and of the
    quantized one."""

    io: IO
    found: Tail
    ids: list[Tensor]
    teacher: Mapping[int, Tensor]
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, io: IO, teacher: Mapping[int, Tensor] | None) -> Iterator[Self]:
        """The tail, with its parameters in memory within the context, if there are states of the unquantized model.

        Rank 0, which has the first batch, finds out for all of what its logits depend on. Raises LlmqError.
        """
        plan = io.plan
        model, blocks = plan.model, [block.module for block in plan.blocks]
        ids = list(torch.split(plan.ids, plan.batch))
        found = find_tail(model, blocks)
        made = cls(io, found, ids, teacher or {})
        if teacher is None:
            yield made
            return
        with in_memory(io, found):
            for name in found.parameters:
                weight = plan.outside.get(plan.links.source.get(name, ""))
                if weight is not None:
                    stored = io.read_back(weight).to(io.device)
                    made.values[name] = model.get_parameter(name).detach(), stored
            with ranks.failing_together():
                if ranks.first():
                    found.settle(teacher[0].to(io.device), ids[0].shape)
            found.apart = ranks.tell(found.apart)
            yield made

    def divergence(self, batch: int, hidden: Tensor) -> float:
        """The sum over a batch's tokens of KL(unquantized ‖ quantized), from the last block's output."""
        with torch.no_grad():
            return sum(float(piece) for _, piece in self._pieces(batch, hidden.to(self.io.device), trained=()))

    def slope(self, batch: int, hidden: Tensor) -> tuple[float, Tensor, dict[str, Tensor]]:
        """As `divergence`, and the sum's slopes: with respect to the output, in its dtype and where it is, and to the
        trained gains of the tail, on the CPU."""
        leaf = hidden.to(self.io.device).detach().requires_grad_(True)
        names, total = [name for name in self.norms if name in self.found.gains], 0.0
        sums: dict[str, Tensor] = {}
        with torch.enable_grad():
            for _, piece in self._pieces(batch, leaf, trained=names):
                piece.backward()  # type: ignore[no-untyped-call]
                total += float(piece.detach())
                for name in names:
                    gradient = self.io.plan.model.get_parameter(name).grad
                    if gradient is not None:
                        wide = gradient.cpu().to(torch.promote_types(gradient.dtype, torch.float32))
                        sums[name] = sums[name] + wide if name in sums else wide
        assert leaf.grad is not None
        return total, leaf.grad.to(hidden), sums

    def _pieces(
        self, batch: int, hidden: Tensor, trained: list[str] | tuple[str, ...]
    ) -> Iterator[tuple[slice, Tensor]]:
        """The tokens' divergences, summed over some tokens at a time. trained: get a gradient."""
        teacher, shape = self.teacher[batch], self.ids[batch].shape
        for part in self.found.pieces(hidden.shape):
            size = None if self.found.apart else shape
            with torch.no_grad():
                self._put(0)
                want = logarithms(self.found.logits(teacher[:, part].to(hidden), size))
            self._put(1)
            for name in trained:
                self.io.plan.model.get_parameter(name).requires_grad_(True)
            have = logarithms(self.found.logits(hidden[:, part], size))
            yield part, nn.functional.kl_div(have, want, log_target=True, reduction="sum")

    def _put(self, which: int) -> None:
        """Give the tail the values of the unquantized (0) or the quantized model (1), where they differ."""
        model, device = self.io.plan.model, self.io.device
        for name, both in self.values.items():
            assign(model, name, both[which])
        for name, norm in self.norms.items():
            if name in self.found.gains:
                value = norm.moved(self.parameters[name].detach()) if which and name in self.parameters else norm.value
                assign(model, name, value.to(device, self.io.plan.dtype))


@contextmanager
def in_memory(io: Reads, found: Tail) -> Iterator[None]:
    """Within the context, what a tail reads is in memory on the device: its parameters, and buffers of the checkpoint
    outside the blocks; whatever else is outside the blocks is zeros."""
    plan = io.plan
    model, blocks = plan.model, [block.module for block in plan.blocks]
    buffers = {name for name, _ in model.named_buffers() if not any(name.startswith(f"{b.name}.") for b in plan.blocks)}
    for name in (*found.parameters, *sorted(buffers & {*plan.links.names()})):
        io.load(name)
    try:
        with zeros_outside(model, blocks, io.device):
            yield
    finally:
        for name in found.parameters:
            empty(model, name)


def logarithms(logits: Tensor) -> Tensor:
    """The logarithms of probabilities, in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).clamp_min(FLOOR)
