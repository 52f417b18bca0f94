"""Learned levels: every row of a weight, or some rows together, have their own, found by weighted k-means.

SqueezeLLM (Kim et al. 2023, arXiv:2306.07629, section 4.1): the levels of an output channel minimize Σ hᵢ (wᵢ − ŵᵢ)²,
where hᵢ is the importance of input i. In one dimension clusters are intervals. The best clusters of whole bins of the
sorted values are found by dynamic programming; bins are as wide as levels would be, if they were many: by the cube root
of the values' density (Panter and Dite 1951). Lloyd's algorithm goes on from there.

Levels of one row are kept in units of a power of two, so that they have its magnitude only when they are stored. Rows
that share levels have a scale each, their root mean square at first, which is stored beside them: what is clustered is
the rows over their scales, and each value counts by the square of its row's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import Quantized, QuantizedWeight, Rounding, check_range, storable
from llmq.grids.scheme import Scheme

STEPS = 10
BINS = 128
CHUNK = 1 << 18
"""Elements of a weight that are clustered at a time."""


class KMeans(Rounding):
    """See `Rounding`. levels: float32 [out, points] of a weight's rows, ascending, in units of their scale; unit: the
    scales that they were found with, [out, 1]."""

    apart = False

    def __init__(self, levels: Tensor | None = None, unit: Tensor | None = None) -> None:
        self._levels, self._unit = levels, unit
        self._bounds = None if levels is None else (levels[:, :-1] + levels[:, 1:]) / 2

    @property
    def learned(self) -> Tensor | None:
        """See `Rounding.learned`."""
        return self._levels

    def on(self, levels: Tensor | None) -> KMeans:
        """See `Rounding.on`."""
        return KMeans(levels, self._unit)

    def part(self, rows: slice) -> KMeans:
        """See `Rounding.part`."""
        return KMeans(self._table()[rows], None if self._unit is None else self._unit[rows])

    def fitted(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> KMeans:
        """See `Rounding.fitted`: 'minmax' spaces levels equally, 'mse' counts all inputs the same."""
        rows, width = weight.shape
        check_range(method, scheme, width)
        if method == "weighted" and importance is None:
            raise LlmqError("range 'weighted' needs the importance of every input; use 'mse' without it")
        shares = importance if method == "weighted" else None
        shares = torch.ones(width, device=weight.device) if shares is None else shares.to(torch.float32)
        # Inputs that are always 0 count a little, or their weights would have no level near them.
        shares = shares.clamp_min(1e-6 * float(shares.mean())) if float(shares.sum()) > 0 else torch.ones_like(shares)
        unit = torch.empty(rows, 1, dtype=scale_dtype, device=weight.device)
        levels = torch.empty(rows, 1 << scheme.bits, device=weight.device)
        if scheme.level_rows > 1:
            return self._shared(weight, scheme, method, shares, unit, levels)
        step = _rows_at_once(width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            some = weight[part].to(torch.float32)
            unit[part] = _units(some, scale_dtype)
            some = some / unit[part].to(torch.float32)
            found = _uniform(some, scheme.bits) if method == "minmax" else _clusters(some, shares, scheme.bits)
            scaled = (found * unit[part].to(torch.float32)).to(scale_dtype).to(torch.float32)
            # Means of equal values may differ in their last bit.
            levels[part] = (scaled / unit[part].to(torch.float32)).cummax(1).values
        return KMeans(levels, unit)

    def _shared(
        self, weight: Tensor, scheme: Scheme, method: str, shares: Tensor, unit: Tensor, levels: Tensor
    ) -> KMeans:
        """`fitted` for levels that rows share; unit, levels: where scales and levels go."""
        rows, width = weight.shape
        together = min(scheme.level_rows, rows)
        step, whole = _rows_at_once(width * together) * together, rows // together * together
        starts = [*range(0, whole, step), *([whole] if whole < rows else [])]
        for start, stop in zip(starts, [*starts[1:], rows], strict=True):
            part, some = slice(start, stop), weight[start:stop].to(torch.float32)
            unit[part] = _sizes(some, unit.dtype)
            size = unit[part].to(torch.float32)
            tables = max(1, (stop - start) // together)
            # The tables' largest scale is the unit of what their values count.
            top = size.view(tables, -1, 1).amax(1, keepdim=True)
            counts = (size.view(tables, -1, 1) / top).square() * shares
            some = (some / size).reshape(tables, -1)
            even = method == "minmax"
            found = _uniform(some, scheme.bits) if even else _clusters(some, counts.flatten(1), scheme.bits)
            found = found.cummax(1).values.to(unit.dtype).to(torch.float32)
            levels[part] = found.repeat_interleave((stop - start) // tables, 0)
        return KMeans(levels, unit)

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`: those of the levels if there are some; else powers of two, or where rows share
        levels, roots of their mean squares."""
        check_range(method, scheme, weight.shape[1])
        if self._unit is not None:
            return self._unit, None
        if scheme.level_rows > 1:
            return _sizes(weight.to(torch.float32), scale_dtype), None
        return _units(weight.to(torch.float32), scale_dtype), None

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`: of each row, [out, points]."""
        return self._table()

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: ties go to the lower level. The first axis is the rows."""
        self._table()
        flat = scaled.reshape(len(scaled), -1).contiguous()
        return self._points(torch.searchsorted(self._bounds, flat)).view(scaled.shape)  # type: ignore[arg-type]

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.encode`: the index of the level."""
        return self._index(points).to(torch.uint8).view(points.shape)

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.decode`."""
        return self._points(codes.to(torch.int64).view(len(codes), -1)).view(codes.shape)

    def reach(self, scheme: Scheme) -> float:
        """See `Rounding.reach`: levels of one row lie within its unit, doubled."""
        return 2.0 if scheme.level_rows == 1 else float(self._table().abs().amax())

    def ranks(self, scheme: Scheme) -> tuple[int, int]:
        """See `Rounding.ranks`."""
        return 0, (1 << scheme.bits) - 1

    def rank(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.rank`."""
        return self._index(points).to(torch.float32).view(points.shape)

    def of_rank(self, ranks: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.of_rank`."""
        return self._points(ranks.to(torch.int64).view(len(ranks), -1)).view(ranks.shape)

    def in_steps(self, away: Tensor, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.in_steps`."""
        rank = self._index(points)
        signs = torch.where(away < 0, -1, 1).view(rank.shape)
        other = (rank + signs).clamp_(0, self._table().shape[1] - 1)
        step = (self._points(other) - self._points(rank)).abs().view(points.shape)
        return torch.where(step > 0, away / step, 0.0)

    def finish(self, weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
        """See `Rounding.finish`: levels as they are stored, in `dtype`; scales of 1, but where rows share levels."""
        if weight.levels is None:
            raise LlmqError(f"a {weight.scheme} weight needs the levels of its rows")
        if weight.scheme.level_rows > 1:
            levels = weight.levels.to(dtype).to(torch.float32)
            return replace(weight, levels=levels, scale=storable(weight.scale.to(torch.float32), dtype).to(dtype))
        levels = (weight.levels * weight.scale.to(torch.float32)).to(dtype).to(torch.float32)
        return replace(weight, levels=levels, scale=torch.ones_like(weight.scale, dtype=dtype))

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """See `Rounding.reopen`: levels in units of a power of two."""
        stored = super().reopen(weight)
        if stored.levels is None:
            raise LlmqError(f"a {weight.scheme} weight needs the levels of its rows")
        if weight.scheme.level_rows > 1:
            return stored
        unit = _units(stored.levels, stored.scale.dtype)
        return replace(stored, levels=stored.levels / unit.to(torch.float32), scale=unit)

    def _table(self) -> Tensor:
        if self._levels is None:
            raise LlmqError("levels that are learned for each row are not known before a weight is: use `fitted`")
        return self._levels

    def _index(self, points: Tensor) -> Tensor:
        """The index of each point's level, int64 [out, n]."""
        flat = points.reshape(len(points), -1).contiguous()
        return torch.searchsorted(self._table(), flat).clamp_(max=self._table().shape[1] - 1)

    def _points(self, index: Tensor) -> Tensor:
        return self._table().gather(1, index)


def _rows_at_once(width: int) -> int:
    """How many rows of so many values are clustered at a time."""
    return max(1, min(CHUNK // width, 4 * CHUNK // (min(width, BINS) + 1) ** 2))


def _sizes(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The root of the mean square of each row of a float32 weight [out, 1], as `dtype` holds it; not 0. Raises
    LlmqError."""
    top = _units(weight, torch.float32)
    mean = (weight / top).square().mean(1, keepdim=True).sqrt()
    return storable(mean * top, dtype).to(dtype)


def _units(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two below each row's largest magnitude, normal in `dtype`; 1 for rows of 0. Raises LlmqError."""
    top = weight.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        raise LlmqError("the weight holds values that are not finite")
    power = torch.exp2((torch.frexp(top).exponent - 1).to(torch.float32)).clamp_min(torch.finfo(dtype).tiny)
    return torch.where(top > 0, power, 1.0).to(dtype)


def _uniform(weight: Tensor, bits: int) -> Tensor:
    """Equally spaced levels from each row's lowest to its highest value, float32 [rows, 2^bits]."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, 1 << bits, device=weight.device)


def _clusters(weight: Tensor, shares: Tensor, bits: int) -> Tensor:
    """The levels of least Σ share · (w − level)² that were found, ascending, float32 [rows, 2^bits].

    shares: of the columns [in], or of every weight.
    """
    ordered, order = weight.sort(1)
    weights = shares.expand_as(order).gather(1, order)
    levels = _best_of_bins(ordered, weights, _edges(ordered, weights), bits)
    for _ in range(STEPS):
        levels = _centroids(ordered, weights, levels)
    return levels


def _edges(ordered: Tensor, weights: Tensor) -> Tensor:
    """Where bins of the sorted values begin and end, int64 [rows, bins + 1]: ∫ density^(1/3) is the same in each."""
    rows, width = ordered.shape
    if width <= BINS:
        return torch.arange(width + 1, device=ordered.device).expand(rows, -1).contiguous()
    # Between two neighbours the density is their mean share over their distance.
    share = (weights[:, :-1] + weights[:, 1:]).div_(2).pow_(1 / 3) * ordered.diff(dim=1).clamp_min_(0).pow_(2 / 3)
    total = share.cumsum(1)
    inner = torch.arange(1, BINS, device=ordered.device) / BINS * total[:, -1:]
    found = torch.nn.functional.pad(torch.searchsorted(total, inner) + 1, (1, 0))
    return torch.nn.functional.pad(found, (0, 1), value=width)


def _best_of_bins(ordered: Tensor, weights: Tensor, edges: Tensor, bits: int) -> Tensor:
    """The best levels among those whose clusters are whole bins, by dynamic programming, float32 [rows, 2^bits]."""
    sums = (weights, weights * ordered, weights * ordered.square())
    mass, first, second = (
        torch.nn.functional.pad(part.to(torch.float64).cumsum(1), (1, 0)).gather(1, edges) for part in sums
    )
    bins = edges.shape[1] - 1
    spread = first.unsqueeze(1) - first.unsqueeze(2)
    cost = second.unsqueeze(1) - second.unsqueeze(2) - spread.square_() / (mass.unsqueeze(1) - mass.unsqueeze(2))
    # From bin i to bin j: i < j; a cluster of nothing costs nothing.
    after = torch.ones(bins + 1, bins + 1, dtype=torch.bool, device=edges.device).triu()
    cost = torch.where(after, cost.nan_to_num_(0, 0, 0), torch.inf).to(torch.float32)
    best, froms = cost[:, 0], []
    for _ in range((1 << bits) - 1):
        best, source = (best.unsqueeze(2) + cost).min(1)
        froms.append(source)
    ends = torch.full((len(edges), 1), bins, device=edges.device)
    bounds = [ends]
    for source in reversed(froms):
        ends = source.gather(1, ends)
        bounds.append(ends)
    at = torch.cat([torch.zeros_like(ends), *reversed(bounds)], 1)
    inside = mass.gather(1, at).diff(dim=1)
    means = first.gather(1, at).diff(dim=1) / inside
    # A level without anything takes the place of the one below it.
    means = torch.where(inside > 0, means, ordered[:, :1].to(torch.float64))
    return means.cummax(1).values.to(torch.float32)


def _centroids(ordered: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """A step of Lloyd's algorithm: the weighted mean of what is nearest to each level; a level without any stays."""
    index = torch.searchsorted((levels[:, :-1] + levels[:, 1:]) / 2, ordered)
    mass = torch.zeros_like(levels).scatter_add_(1, index, weights)
    sums = torch.zeros_like(levels).scatter_add_(1, index, weights * ordered)
    return torch.where(mass > 0, sums / mass, levels)
