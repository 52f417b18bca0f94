"""How the bits of a run's weights were chosen: the goal, what was compared, and what it cost in truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TriedRow:
    """An allocation that was compared. name: how it was found; bits: stored bits per weight; predicted: the divergence
    in nats, as the sum of those of single groups; truth: measured with all of it rounded, without corrections; None if
    it was not."""

    name: str
    bits: float
    predicted: float
    truth: float | None


@dataclass(frozen=True)
class BitsRow:
    """The choice of bits.

    goal: what was asked for, in words; score: how losses were found; groups: the number of groups of weights with one
    scheme each; tried: what was compared, the chosen one first; curve: (stored bits per weight, predicted divergence)
    of the best allocations for rising sizes; uniform: (scheme, stored bits per weight, predicted divergence) of one
    scheme for all; written: the divergence of the written folder, in nats, on the windows that `truth` is of; lines:
    (what, bytes) that the memory of the process that serves the folder is made of; milliseconds: of one of its decode
    steps, predicted; seconds: of the choice, and processor: of processors in them.
    """

    goal: str
    score: str
    groups: int
    tried: tuple[TriedRow, ...]
    curve: tuple[tuple[float, float], ...]
    uniform: tuple[tuple[str, float, float], ...]
    seconds: float
    processor: float = 0.0
    written: float | None = None
    lines: tuple[tuple[str, float], ...] = ()
    milliseconds: float | None = None

    @property
    def chosen(self) -> TriedRow:
        """The allocation that is used."""
        return self.tried[0]

    @property
    def same(self) -> tuple[str, float, float] | None:
        """Of one scheme for all weights, the largest that is no larger than the chosen allocation."""
        within = [row for row in self.uniform if row[1] <= self.chosen.bits + 1e-9]
        return max(within, key=lambda row: (row[1], -row[2]), default=None)

    @property
    def beside(self) -> str:
        """What one scheme for all weights would have, in words; empty if that was not asked."""
        if self.same is None:
            return "no candidate for all weights is as small" if self.uniform else ""
        name, bits, predicted = self.same
        said = f"{name}, {bits:.2f} stored bits per weight, {predicted:.4f} nats predicted"
        return f"one scheme for all, at most as large: {said}"

    def __str__(self) -> str:
        one = self.chosen
        told = f"{one.bits:.2f} stored bits per weight for {self.goal}, {self.groups} groups of weights"
        told += f", {self.milliseconds:.3g} ms a token predicted" if self.milliseconds is not None else ""
        told += f"; divergence {one.predicted:.4f} nats predicted"
        told += f", {one.truth:.4f} measured without corrections" if one.truth is not None else ""
        return told + (f", {self.written:.4f} as written" if self.written is not None else "")

    def measured(self, written: float) -> BitsRow:
        """With the divergence of the written folder."""
        return replace(self, written=written)


def read_bits(data: Mapping[str, Any] | None) -> BitsRow | None:
    """A row from plain data; None if there is none. Raises KeyError or TypeError."""
    if data is None:
        return None
    values = {name: data[name] for name in BitsRow.__dataclass_fields__ if name in data}
    values["tried"] = tuple(TriedRow(**row) for row in data["tried"])
    return BitsRow(**values | {name: tuple(map(tuple, data[name])) for name in ("curve", "uniform", "lines")})
