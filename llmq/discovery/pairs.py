"""Scale pairs of a decoder block: where a positive factor per channel can move from one parameter to those it feeds.

Methods that migrate scales between a norm and the matrices behind it, or between two matrices (AWQ, SmoothQuant,
Outlier Suppression), work on these. find_pairs.py finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

NORM, LINEAR = "norm", "linear"


@dataclass(frozen=True)
class Edit:
    """A factor per entry along an axis of a parameter: value → (value + offset) · factor − offset."""

    axis: int
    factor: Tensor
    offset: float = 0.0

    def of(self, value: Tensor) -> Tensor:
        """The edited value, float32 of the same shape; products are taken in float32."""
        shape = [1] * value.dim()
        shape[self.axis] = -1
        factor = self.factor.to(value.device, torch.float32).reshape(shape)
        return (value.float() + self.offset) * factor - self.offset if self.offset else value.float() * factor


@dataclass(frozen=True)
class Consumer:
    """A matrix that a source feeds.

    axis: which axis of the stored parameter its input runs along (1 for nn.Linear, 0 for a matrix stored [in, out]);
    channel: int64 [width], the source's channel that feeds each input column (repeated where heads are shared);
    bias: the vector added to its output, if it has one.
    """

    parameter: str
    axis: int
    channel: Tensor
    bias: str | None


@dataclass(frozen=True)
class Pair:
    """A place where a positive factor per channel can move from a source to all it feeds without changing the block.

    kind: "norm" (a norm's weight → matrices) or "linear" (a matrix's output rows → the columns of the next).
    source, bias: parameter names within the block; the bias is divided with the source.
    axis: the axis of the stored source along which its channels lie. offset: 1 for norms that multiply by 1 + w.
    rows: int64 [channels], the source's entry of each channel; None where channel c is entry c of `entries`.
    shiftable: whether a constant per channel can leave the source's bias and be added to the consumers' biases.
    """

    kind: str
    source: str
    bias: str | None
    axis: int
    offset: float
    rows: Tensor | None
    entries: int
    consumers: tuple[Consumer, ...]
    channels: int
    shiftable: bool = False

    def describe(self) -> str:
        """What it connects, in words: 'source → consumer, consumer'."""
        return f"{self.source} → {', '.join(consumer.parameter for consumer in self.consumers)}"

    def gain(self, source: Tensor) -> Tensor:
        """The factor by which the source scales each channel: |w| of a norm, the norm of a matrix's rows.

        source: the parameter, float32. Returns float32 [channels].
        """
        rows = source if self.rows is None else source.index_select(self.axis, self.rows.to(source.device))
        if rows.dim() == 1:
            return (rows + self.offset).abs()
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1 - self.axis)
        return lengths

    def edits(self, scale: Tensor) -> dict[str, Edit]:
        """The edit of each parameter when the source's channels are divided by `scale` [channels] > 0.

        On the matrices and biases of float32 master copies, use `edits(scale)[name].of(value)`.
        """
        scale = scale.detach().float().cpu()
        if scale.shape != (self.channels,) or not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
            raise ValueError(f"{self.source}: a scale is {self.channels} positive numbers, not {tuple(scale.shape)}")
        inverse = self._spread(1 / scale, 1.0)
        made = {self.source: Edit(self.axis, inverse, self.offset)}
        if self.bias is not None:
            made[self.bias] = Edit(0, inverse)
        return made | {s.parameter: Edit(s.axis, scale[s.channel]) for s in self.consumers}

    def shifts(self, shift: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The additions to biases that subtract `shift` z [channels] from the source's output and compensate for it.

        Float32: −z at the source, W z at the consumers.
        weights: the consumers' matrices by parameter name, as stored. Outlier Suppression+ (Wei et al., 2023), §4.1.
        Raises ValueError if the pair is not shiftable.
        """
        if not self.shiftable or self.bias is None:
            raise ValueError(f"{self.source}: this pair has no biases that could absorb a shift")
        shift = shift.detach().float().cpu()
        made = {self.bias: self._spread(-shift, 0.0)}
        for consumer in self.consumers:
            weight = weights[consumer.parameter].float()
            moved = shift[consumer.channel].to(weight.device)
            assert consumer.bias is not None
            made[consumer.bias] = weight @ moved if consumer.axis == 1 else moved @ weight
        return made

    def apply(self, block: nn.Module, scale: Tensor) -> None:
        """Divide the source by `scale` [channels] > 0 and multiply the consumers by it, in place, in float32."""
        with torch.no_grad():
            for name, edit in self.edits(scale).items():
                parameter = block.get_parameter(name)
                parameter.copy_(edit.of(parameter))

    def apply_shift(self, block: nn.Module, shift: Tensor) -> None:
        """Subtract `shift` [channels] from the source's output and compensate in the consumers' biases, in place."""
        with torch.no_grad():
            weights = {s.parameter: block.get_parameter(s.parameter) for s in self.consumers}
            for name, value in self.shifts(shift, weights).items():
                parameter = block.get_parameter(name)
                parameter.copy_(parameter.float() + value.to(parameter.device))

    def _spread(self, values: Tensor, fill: float) -> Tensor:
        if self.rows is None:
            return values
        spread = torch.full((self.entries,), fill)
        spread[self.rows] = values
        return spread


@dataclass(frozen=True)
class Rejection:
    """A parameter from which no scale can move, and the reason, for users."""

    source: str
    reason: str


class Found(NamedTuple):
    """The pairs of a block, and the parameters that make no pair; experts: the same of each of its routed experts."""

    pairs: list[Pair]
    rejections: list[Rejection]
    experts: tuple[list[Pair], list[Rejection]] = ([], [])


def explain(pairs: list[Pair], rejections: list[Rejection]) -> list[tuple[str, str, str]]:
    """A row for each source of a block: its name, what it feeds or why nothing can move from it, and its kind.

    The kind is "norm" or "linear", "norm, shift" if a shift can move too, and empty for a rejection.
    """
    rows = []
    for pair in pairs:
        source = pair.source + (f" [{pair.channels} of {pair.entries} rows]" if pair.rows is not None else "")
        rows.append((source, ", ".join(s.parameter for s in pair.consumers), pair.kind + ", shift" * pair.shiftable))
    return rows + [(r.source, r.reason, "") for r in rejections]
