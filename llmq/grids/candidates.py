"""Many scales and zero points of a group of whole numbers judged at once, by sums looked up for each weight.

For codes c − z = k and weights a, Σ a(w − s·k)² is minimal at s = Σ a·w·k / Σ a·k², with the value Σ a·w² − (Σ
a·w·k)² / Σ a·k²: two sums of each candidate give both the best scale for its codes and its error. In units of the
group's largest magnitude (of its whole range, if there are zero points) candidates are the same for all groups, and
w·k and k² depend on nothing but w: they are tabulated for evenly spaced w, a row for each, and the sums of a group are
those of the rows of its weights. What is found is a start: its error is measured before it is used.

With zero points, what is worth trying depends on how much of the range is below 0, in steps of a sixteenth: there is a
table for each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llmq.grids.scheme import Scheme

SIDED = 5
"""From this many bits on, the extra level of a symmetric grid is on the side of the largest weight."""
LARGEST = 1.1
SMALLEST = {2: 0.30, 3: 0.35, 4: 0.45, 5: 0.55, 6: 0.65, 7: 0.75, 8: 0.80}
"""The largest and smallest scale, as fractions of min-max: coarser grids gain from more clipping."""
SCALES = 16
"""Log-spaced scales; twice as many where only one side is tried."""
LONG = 512
"""Groups of more weights, of up to 4 bits, may gain from twice as much clipping: half as many scales more are tried."""
LEANS = 16
"""Steps of how much of a group's range is below 0."""
PLACES, MOST_PLACES = 256, 2048
"""The evenly spaced weights from 0 to the largest magnitude: at least, and at most."""
TINY = torch.finfo(torch.float32).tiny


class _Table(NamedTuple):
    """sums: float32 [leans · (2 · places + 1), 2 · candidates], w·k of all candidates and then k²; zero: float32
    [leans, candidates], −1 for the mirrored grid of a symmetric scheme, whose levels are those of that zero point."""

    sums: Tensor
    zero: Tensor
    places: int


def scales_of(bits: int, count: int, smallest: float | None = None) -> list[float]:
    """Log-spaced candidates, as fractions of the scale of min-max, falling."""
    ratio = ((smallest or SMALLEST[bits]) / LARGEST) ** (1 / (count - 1))
    return [LARGEST * ratio**index for index in range(count)]


def best_candidate(
    weight: Tensor, low: Tensor, high: Tensor, scheme: Scheme, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best candidate of each group: its least-squares scale, 0 if none was found, and its zero point, 0 if the
    scheme is symmetric, both float32 [rows, groups, 1].

    weight: float32 [rows, groups, size]; low, high: the extremes [rows, groups, 1]; importance: [1, groups, size].
    """
    table = _table(scheme.bits, scheme.symmetric, weight.shape[-1] > LONG and scheme.bits < SIDED, weight.device)
    if scheme.symmetric:
        # In its own units, the largest magnitude is that of −1, where the grid has its extra level.
        unit, lean = torch.where(high > -low, -high, -low), torch.zeros_like(low)
    else:
        below = low.clamp(max=0)
        unit = high.clamp(min=0) - below
        lean = (below / -unit.clamp_min(TINY) * LEANS).round_()
    unit = torch.where(unit == 0, 1.0, unit)
    rows = lean * (2 * table.places + 1) + (table.places + 0.5)
    # Conversion cuts off, so that half a row more rounds.
    row = torch.addcmul(rows, weight, table.places / unit).to(torch.int32).flatten(0, 1)
    shares = None if importance is None else importance.expand_as(weight).flatten(0, 1)
    sums = functional.embedding_bag(row, table.sums, mode="sum", per_sample_weights=shares)
    dots, sizes = sums.tensor_split(2, 1)
    scales = dots / sizes.clamp_min(TINY)
    winner = (scales * dots).argmax(1, keepdim=True)
    zero = table.zero[lean.flatten().to(torch.int64), winner.squeeze(1)].view_as(unit)
    scale = scales.gather(1, winner).view_as(unit) * unit
    if scheme.symmetric:
        # Level −k of the mirrored grid is level k of the grid itself with a negative scale.
        return torch.where(zero < 0, -scale, scale), torch.zeros_like(zero)
    return scale, zero


@functools.lru_cache(maxsize=64)
def _table(bits: int, symmetric: bool, long: bool, device: torch.device) -> _Table:
    """The sums of all candidates of a grid. An asymmetric one of more than 4 bits would need too many leans."""
    steps = 2**bits - 1
    least = 2.0 / steps if symmetric else 1.0 / steps
    places = min(MOST_PLACES, max(PLACES, 2 ** (bits + 4))) * (1 if symmetric else 2)
    weight = torch.arange(-places, places + 1, dtype=torch.float64, device=device)[:, None] / places
    fractions = scales_of(bits, 2 * SCALES if symmetric and bits >= SIDED else SCALES)
    if long:
        fractions = scales_of(bits, SCALES + SCALES // 2, SMALLEST[bits] / 2)
    sums, zeros = [], []
    for lean in range(1 if symmetric else LEANS + 1):
        below = lean / LEANS
        tried = [
            (fraction * least, zero)
            for fraction in fractions
            for zero in _zeros(bits, symmetric, below, fraction * least)
        ]
        scale, zero = torch.tensor(tried, dtype=torch.float64, device=device).t()
        lowest = -(2 ** (bits - 1)) - zero
        level = torch.minimum(torch.maximum((weight / scale).round_(), lowest), lowest + steps)
        sums.append(torch.cat([level * weight, level.square_()], 1).to(torch.float32))
        zeros.append(zero.to(torch.float32))
    return _Table(torch.cat(sums), torch.stack(zeros), places)


def _zeros(bits: int, symmetric: bool, below: float, scale: float) -> list[int]:
    """The zero points to try: those around the one that divides the clipping evenly between both ends, and those that
    clip at one end only. below: the part of the range, 1, that is below 0."""
    if symmetric:
        return [0, -1] if bits < SIDED else [0]
    lowest = -(2 ** (bits - 1))
    first, last = lowest + below / scale, -1 - lowest - (1 - below) / scale
    middle = round((first + last) / 2)
    return [min(max(zero, lowest), -1 - lowest) for zero in (middle, round(first), round(last), middle - 1, middle + 1)]
