"""The routed experts of a block as one row: quantiles of their errors and of the tokens that chose them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, TypeVar

# For `llmq methods` and similar commands, which do not import torch.
if TYPE_CHECKING:
    from llmq.report.report import Report
    from llmq.report.rows import WeightRow


class Weight(Protocol):
    """A weight of a plan or a report; expert: None if it is no routed expert's."""

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def expert(self) -> int | None: ...


W = TypeVar("W", bound=Weight)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block that are quantized.

    place: the part of their weights' names before the expert's number; rows: of all their weights; errors: the median,
    the 90 % quantile and the largest of the weights' errors; each: (tokens, mean error of its weights) of every expert,
    by its number, tokens is None where it was not recorded; tokens: the smallest, the median and the largest number;
    idle: how many experts no token chose; routing: see `BlockRow`.
    """

    block: int
    place: str
    rows: list[WeightRow]
    errors: tuple[float, float, float]
    each: list[tuple[int | None, float]]
    routing: float | None

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * sum(row.bytes for row in self.rows) / max(1, sum(prod(row.shape) for row in self.rows))

    @property
    def tokens(self) -> tuple[int, int, int] | None:
        """See the class; None if they were not recorded."""
        known = [tokens for tokens, _ in self.each if tokens is not None]
        return (min(known), int(quantile(known, 0.5)), max(known)) if known else None

    @property
    def idle(self) -> int:
        """See the class."""
        return sum(tokens == 0 for tokens, _ in self.each)


def experts_of(report: Report) -> list[Experts]:
    """The experts of every block of a report that has some."""
    found = []
    for rows in grouped(report.quantized):
        if isinstance(rows, list):
            apart: dict[int, list[WeightRow]] = {}
            for row in rows:
                assert row.expert is not None
                apart.setdefault(row.expert, []).append(row)
            each = [(mine[0].tokens, sum(row.error for row in mine) / len(mine)) for _, mine in sorted(apart.items())]
            errors = [row.error for row in rows]
            quantiles = quantile(errors, 0.5), quantile(errors, 0.9), quantile(errors, 1.0)
            block = rows[0].block
            assert block is not None  # experts outside the blocks are quantized as any matrix
            found.append(Experts(block, place(rows), rows, quantiles, each, report.blocks[block].routing))
    return found


def grouped(items: Iterable[W]) -> list[W | list[W]]:
    """The weights in their order, with those of a block's experts as one list, in the place of its first."""
    found: list[W | list[W]] = []
    lists: dict[int | None, list[W]] = {}
    for item in items:
        if item.expert is None:
            found.append(item)
        elif item.block in lists:
            lists[item.block].append(item)
        else:
            lists[item.block] = [item]
            found.append(lists[item.block])
    return found


def place(items: Sequence[Weight]) -> str:
    """The dotted parts that the names of experts' weights begin with, up to the first that differs."""
    first, last = (name.split(".") for name in (min(i.name for i in items), max(i.name for i in items)))
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return ".".join(first[:same])


def shapes(items: Iterable[Sequence[int]], times: str = "×") -> str:
    """The different shapes among some, in their order; more than three are counted."""
    found = [times.join(map(str, shape)) for shape in dict.fromkeys(map(tuple, items))]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest of the values that this share of them does not exceed; what is not a number is the largest."""
    ordered = sorted(values, key=lambda value: (math.isnan(value), value))
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
