"""HQQ: a grid by half-quadratic splitting, without any data (Badri and Shaji 2023, "Half-Quadratic Quantization of
Large Machine Learning Models", mobiusml.github.io/hqq_blog).

HQQ minimizes Σ|w − ŵ|^p of each group. An auxiliary variable e stands for the residual, and two steps alternate: e ←
shrink(w − ŵ), the proximal step of |e|^p, and a least-squares fit of the grid to w − e, while the penalty β on the
difference of e and the residual grows. The original method optimizes a real-valued zero point and keeps the min-max
scale. The formats of llmq store integer zero points, or none, so here the scale is optimized too, also in closed form:
Σ(w − e)k / Σk² for levels k. The real zero point is rounded, the scale is fitted to the rounded one, and neighbouring
zero points are tried at the end.

The problem has many local minima, so the splitting starts twice: from the range of `mse`, and from the best of several
scales from min-max down. Candidates are compared by the objective on the stored grid and the best is kept; the range of
`mse` is the first candidate, so the result is never worse than it.

Residuals are shrunk in units of the scale, so that one β suits weights of any magnitude. (The original does not
rescale: p = 0.7 and β = 10 shrink all residuals below 0.17 to 0, which is ordinary least squares.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, parts, rounded_on, rounding_of
from llmq.grids.scheme import Scheme

STARTS = tuple(1.1 * 0.88**step for step in range(14))
"""The starting scales besides that of 'mse', as fractions of min-max: 1.1 to 0.21."""


def check_options(p: float, *, beta: float = 1, kappa: float = 1, iterations: int = 1, unbiased: float = 0) -> None:
    """Raises LlmqError for invalid options of `half_quadratic`."""
    if not 0 < p <= 8 or beta <= 0 or kappa < 1 or iterations < 1 or not 0 <= unbiased <= 1:
        raise LlmqError(
            "half-quadratic splitting needs 0 < p ≤ 8, beta > 0, kappa ≥ 1, iterations ≥ 1 and 0 ≤ unbiased ≤ 1, "
            f"not {p}, {beta}, {kappa}, {iterations}, {unbiased}"
        )


def half_quadratic(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.05,
    iterations: int = 4,
    unbiased: float = 0.0,
) -> QuantizedWeight:
    """Quantize one weight to the grid of least Σ|w − ŵ|^p in each group.

    weight: any float [out, in], `in` a multiple of the group size; scale_dtype: the scale's stored dtype. p: above 0;
    with smaller p, outliers count less. beta, kappa: the initial penalty and its growth per iteration; iterations: per
    start. unbiased: 0…1, how far (on a log scale) the found scale is moved towards the one at which Σw·ŵ = Σw², that
    is, at which rounding does not shrink the group (the scale of EDEN, Vargaftik et al. 2022, arXiv:2108.08842, §3);
    the objective is then no longer minimal. Raises LlmqError for invalid options, a group size that does not divide
    `in`, or values that are not finite.
    """
    check_options(p, beta=beta, kappa=kappa, iterations=iterations, unbiased=unbiased)
    rounding = rounding_of(scheme.rules)
    scale_dtype = rounding.scale_dtype or scale_dtype
    scale, zero = rounding.find_scale(weight, scheme, "mse", None, scale_dtype)
    options = p, beta, kappa, iterations, unbiased
    if scheme.rules.rows == 1:
        codes = _solve(weight, scale, zero, scheme, scale_dtype, *options)
    else:
        for start in range(0, len(weight), scheme.rules.rows):
            band = slice(start, start + scheme.rules.rows)
            # A block of channels with one scale is a group.
            blocks = weight[band].reshape(-1, scale.shape[1], weight.shape[1] // scale.shape[1]).transpose(0, 1)
            mine = scale[start].unsqueeze(1).clone()
            _solve(blocks.flatten(1), mine, None, scheme, scale_dtype, *options)
            scale[band] = mine.t()
        return rounded_on(weight, scale, zero, scheme)
    if rounding.settle(scale, zero, scheme)[2] is not None:
        return rounded_on(weight, scale, zero, scheme)
    return QuantizedWeight(codes, scale, zero, scheme)


def _solve(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
    unbiased: float,
) -> Tensor:
    """Improves the scales [rows, groups] and zero points of a weight in place; returns the codes. The rest as in
    `half_quadratic`.
    """
    rounding = rounding_of(scheme.rules)
    codes = torch.empty(weight.shape, dtype=rounding.code_dtype, device=weight.device)
    for part in parts(weight, scale.shape[1]):
        rows, unit = part.rows, part.unit
        first = scale[rows].to(torch.float32).unsqueeze(-1) / unit
        middle = torch.zeros_like(first) if zero is None else zero[rows].to(torch.float32).unsqueeze(-1)
        solver = _Solver(part.weight / unit, unit, scheme, scale_dtype, p, first, middle)
        solver.descend(first, middle, beta, kappa, iterations)
        for share in STARTS:
            narrow, zeros = solver.narrowed(share)
            for each in zeros:
                solver.descend(narrow, each, beta, kappa, 0)
        solver.descend(solver.scale, solver.zero, beta, kappa, iterations)
        for shift in () if scheme.symmetric else (-1, 1):
            solver.descend(solver.scale, solver.shifted(shift), beta, kappa, 2)
        levels = solver.levels(solver.scale, solver.zero)
        codes[rows] = rounding.encode((levels + solver.zero).flatten(1), scheme)
        found = solver.straightened(levels, unbiased) if unbiased else solver.scale
        live = part.top > 0
        # Those of groups of zeros are the grid's own.
        scale[rows] = torch.where(live, found * unit, scale[rows].unsqueeze(-1)).squeeze(-1).to(scale_dtype)
        if zero is not None:
            zero[rows] = solver.zero.squeeze(-1).to(torch.int8)
    return codes


class _Solver:
    """A chunk of groups normalized to magnitude 1, float32 [rows, groups, size], and the best grid so far of each."""

    def __init__(
        self, weight: Tensor, unit: Tensor, scheme: Scheme, dtype: torch.dtype, p: float, scale: Tensor, zero: Tensor
    ) -> None:
        self.weight, self.unit, self.scheme, self.dtype, self.p = weight, unit, scheme, dtype, p
        self.low, self.high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        self.scale, self.zero = scale, zero
        self.cost = self._cost(weight - self.levels(scale, zero) * scale)

    def stored(self, scale: Tensor) -> Tensor:
        """The scale as read back from disk, for magnitude 1: rounded to its dtype, finite, normal, never 0."""
        return rounding_of(self.scheme.rules).storable(scale, self.dtype, self.unit)

    def levels(self, scale: Tensor, zero: Tensor) -> Tensor:
        """point − zero of every element."""
        rounding = rounding_of(self.scheme.rules)
        if self.scheme.symmetric:
            return rounding.nearest(self.weight / scale, None, self.scheme)
        return rounding.nearest(self.weight / scale, zero, self.scheme).sub_(zero)

    def narrowed(self, share: float) -> tuple[Tensor, list[Tensor]]:
        """A fraction of min-max as scale, with the sign of the best so far; zero points that clip both ends or one."""
        scheme = self.scheme
        if scheme.symmetric:
            size = torch.maximum(self.high, -self.low) * (share / rounding_of(scheme.rules).reach(scheme))
            return torch.copysign(size, self.scale), [self.zero]
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = self.stored((high - low) * (share / (2**scheme.bits - 1)))
        below, above = scheme.qmin - low / scale, scheme.qmax - high / scale
        zeros = ((below + above) / 2, below, above)
        return scale, [zero.round_().clamp_(scheme.qmin, scheme.qmax) for zero in zeros]

    def shifted(self, shift: int) -> Tensor:
        """A neighbour of the best zero point."""
        return (self.zero + shift).clamp_(self.scheme.qmin, self.scheme.qmax)

    def descend(self, scale: Tensor, zero: Tensor, beta: float, kappa: float, iterations: int) -> None:
        """Half-quadratic splitting from a starting grid; every iterate better than the best so far is kept."""
        scheme = self.scheme
        for index in range(iterations + 1):
            scale = self.stored(scale)
            levels = self.levels(scale, zero)
            left = self.weight - levels * scale
            self._take(self._cost(left), scale, zero)
            if index == iterations:
                return
            kept = self.weight - _shrink(left / scale, self.p, beta * kappa**index) * scale
            if not scheme.symmetric and index % 2:
                # The best real zero point for these codes, as in the original; the scale follows in the next iteration.
                real = (levels + zero - kept / scale).mean(-1, keepdim=True)
                zero = real.round_().clamp_(scheme.qmin, scheme.qmax)
                continue
            size = levels.square().sum(-1, keepdim=True)
            fit = (kept * levels).sum(-1, keepdim=True) / size.clamp_min(torch.finfo(torch.float32).tiny)
            scale = torch.where((size > 0) & (fit * scale > 0), fit, scale)

    def straightened(self, levels: Tensor, share: float) -> Tensor:
        """The stored scale, moved by a fraction of the way to the one with Σw·ŵ = Σw² for these levels."""
        along = (self.weight * levels).sum(-1, keepdim=True)
        whole = self.weight.square().sum(-1, keepdim=True) / along
        usable = torch.isfinite(whole) & (whole * self.scale > 0)
        ratio = torch.where(usable, whole / self.scale, 1.0).clamp_(0.5, 2)
        return self.stored(self.scale * ratio**share)

    def _cost(self, left: Tensor) -> Tensor:
        return _power(left.abs(), self.p).sum(-1, keepdim=True)

    def _take(self, cost: Tensor, scale: Tensor, zero: Tensor) -> None:
        better = cost < self.cost
        self.cost = torch.where(better, cost, self.cost)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)


def _power(size: Tensor, p: float) -> Tensor:
    """size^p for p > 0 and nonnegative float32; whole and half powers without pow, which is five times slower."""
    if p not in (1.0, 1.5, 2.0, 2.5, 3.0):
        return size.pow(p)
    power = size if p < 2 else size.square()
    if p == 3:
        power = power.mul_(size)
    return power * size.sqrt() if p % 1 else power


def _shrink(left: Tensor, p: float, beta: float) -> Tensor:
    """HQQ's generalized soft threshold: sign(x)·max(|x| − |x|^(p−1)/β, 0)."""
    size = left.abs()
    by = (_power(size, p - 1) if p > 1 else size.clamp_min(1e-6).pow(p - 1)) / beta
    return torch.copysign((size - by).clamp_min_(0), left)
