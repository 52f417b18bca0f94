"""Coordinate descent after GPTQ: improve each scale and code with all others fixed.

GPTQ fixes a group's scale before the group's weights are compensated, and a code before later codes are known. Here
every group is visited again, a few times: first its scale, then its codes one column at a time, each set to its best
value with all others fixed. The objective is the same, tr((W − Ŵ) H (W − Ŵ)ᵀ), and every step is the exact minimum of a
parabola in one unknown per row, so the objective never rises. (Coordinate descent on codes: Behdin et al. 2023,
QuantEase, arXiv:2309.01885, §3; here scales are updated in the same sweep, in their stored dtype.)

With G = (W − Ŵ) H, moving a row's Ŵ by δ along a direction d changes the objective by δ²·dᵀHd − 2δ·G·d. G of a group is
computed on reaching it: long products run faster than updates of all of G by each group, and rounding does not add up.
One sweep costs twice as much as one pass of GPTQ without the factorization.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.grids.base import QuantizedWeight, Units
from llmq.numerics.columns import compensate, kernels_for
from llmq.numerics.levels import refit


def improve(
    q: QuantizedWeight, weight: Tensor, hessian: Tensor, *, sweeps: int, damping: float = 0.01, block_size: int = 128
) -> QuantizedWeight:
    """Lower tr((W − Ŵ) H (W − Ŵ)ᵀ) by changing scales and codes of `q`; zero points are fixed, but where minima are
    stored in their place.

    weight: any float [out, in]; hessian: float32 [in, in], positive semidefinite: damping · mean(diag H) is added to
    its diagonal during the call; sweeps: the number of visits to every group. Returns a new weight, with the same
    notes. Uses two float32 matrices of the weight's size, with a single group three.
    """
    if sweeps < 1:
        return q
    diagonal = hessian.diagonal()
    before = diagonal.clone()
    diagonal += damping * before.mean()
    try:
        return _Descent(q, weight, hessian).run(sweeps, block_size)
    finally:
        diagonal.copy_(before)


class _Descent:
    """The state of a descent, transposed [in, out] so that a column of the weight is contiguous."""

    def __init__(self, q: QuantizedWeight, weight: Tensor, hessian: Tensor) -> None:
        self.q, self.hessian = q, hessian
        self.size = q.codes.shape[1] // q.scale.shape[1]
        error = weight.to(torch.float32) - q.dequantize(torch.float32)
        self.error = error.t().contiguous()
        del error
        self.rounding = q.rounding
        points = self.rounding.decode(q.codes, q.scheme)
        self.points = torch.empty(points.t().shape, device=weight.device).copy_(points.t())
        self.scale = q.scale.to(torch.float32).t().contiguous()
        self.zero = None if q.zero is None else q.zero.to(torch.float32).t().contiguous()
        self.curvature = hessian.diagonal()
        self.units = self.rounding.units(q)
        self.kernels = kernels_for(self.rounding, q.scheme, weight.device)
        # Levels of each row move in the place of its scale.
        fixed = q.stored_scale is not None or (self.rounding.learned is not None and q.scheme.level_rows == 1)
        self._scales_move = self.units is not None or not fixed

    def run(self, sweeps: int, block_size: int) -> QuantizedWeight:
        """Visit every group `sweeps` times."""
        width = self.points.shape[0]
        for _ in range(sweeps):
            self._relevel()
            for start in range(0, width, self.size):
                group = slice(start, start + self.size)
                if self.size <= block_size:
                    local = self.hessian[group] @ self.error
                    shift = self._rescale(start, local)
                    local.addmm_(self.hessian[group, group], shift, alpha=-1)
                    self.error[group] -= shift.add_(self._recode(start, group.stop, local))
                    continue
                if self._scales_move:
                    self.error[group] -= self._rescale(start, self.hessian[group] @ self.error)
                for inside in range(start, group.stop, block_size):
                    part = slice(inside, min(inside + block_size, group.stop))
                    self.error[part] -= self._recode(part.start, part.stop, self.hessian[part] @ self.error)
        self._relevel()
        scale = self.scale.t().to(self.q.scale.dtype).contiguous()
        q = replace(self.q, codes=self._codes(), scale=scale, levels=self.rounding.learned)
        if self.units is None:
            return q
        zero = None if self.zero is None else self.zero.t().contiguous()
        scale, zero, stored = self.rounding.settle(scale, zero, q.scheme)
        return replace(q, scale=scale, zero=zero, stored_scale=stored)

    def _codes(self) -> Tensor:
        """The current codes [out, in]."""
        return self.rounding.encode(self.points.t().contiguous(), self.q.scheme)

    def _relevel(self) -> None:
        """Set the best levels of each row, or of rows that share them, given codes, where the grid learns them."""
        if self.rounding.learned is None:
            return
        codes, scale, together = self._codes(), self.scale.t(), self.q.scheme.level_rows
        held, given = self.rounding.learned, (self.hessian @ self.error, self.hessian, self.q.scale.dtype)
        if together > 1:
            levels = refit(codes, held, *given, scale, together)
        else:
            levels = refit(codes, held * scale, *given) / scale
        del given
        moved = levels.gather(1, codes.to(torch.int64)).t().contiguous()
        self.error -= (moved - self.points).mul_(self.scale)
        self.points, self.rounding = moved, self.rounding.on(levels)

    def _rescale(self, start: int, gradient: Tensor) -> Tensor:
        """Set the best scale, given its codes, of the group that begins at a column; returns the change of Ŵ.

        gradient: float32 [size, out], G of the group's columns.
        """
        group, part = start // self.size, slice(start, start + self.size)
        if not self._scales_move:
            return torch.zeros_like(gradient)
        if self.units is not None:
            return self._remultiply(group, part, gradient, self.units)
        levels = self.points[part] if self.zero is None else self.points[part] - self.zero[group]
        bend = self.hessian[part, part] @ levels
        slope = (levels * gradient).sum(0)
        bend = (levels * bend).sum(0)
        old = self.scale[group]
        best = old + slope / bend
        fine = torch.isfinite(best) & (best.abs() >= torch.finfo(self.q.scale.dtype).tiny) & (best * old > 0)
        change = self.rounding.storable(best, self.q.scale.dtype) - old
        change = torch.where(fine & (change * (2 * slope - change * bend) > 0), change, 0.0)
        self.scale[group] += change
        return levels * change

    def _remultiply(self, group: int, part: slice, gradient: Tensor, units: Units) -> Tensor:
        """`_rescale` where scales are whole multiples: the best of three next to the best real number, each with the
        best multiple for its minimum. Changes of the scale by a and the minimum by −b change Ŵ by a · points + b."""
        points, hessian = self.points[part], self.hessian[part, part]
        unit, old = units.scale[:, group], self.scale[group]
        bends = hessian @ points
        slope, bend = (points * gradient).sum(0), (points * bends).sum(0)
        best = slope / bend
        if units.minimum is not None and self.zero is not None:
            low, step = self.zero[group] * old, units.minimum[:, group]
            pull, across, flat = gradient.sum(0), bends.sum(0), hessian.sum()
            best = (flat * slope - across * pull) / (bend * flat - across.square())
        best = torch.where(torch.isfinite(best), best, 0.0)
        most, change, lift = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old)
        for aside in (0, 1, -1):
            whole = ((old + best) / unit).round_().add_(aside).clamp_(*units.limits)
            a = torch.where(whole == 0, aside or 1, whole) * unit - old
            b = torch.zeros_like(a)
            gain = a * (2 * slope - a * bend)
            if units.minimum is not None and self.zero is not None:
                wanted = (low - (pull - a * across) / flat) / step
                b = low - wanted.nan_to_num_(0, 0, 0).round_().clamp_(0, units.highest) * step
                gain = gain + b * (2 * (pull - a * across) - b * flat)
            better = gain > most
            most, change, lift = (
                torch.where(better, new, kept) for new, kept in ((gain, most), (a, change), (b, lift))
            )
        self.scale[group] += change
        if self.zero is not None:
            self.zero[group] = (low - lift) / self.scale[group]
        return points * change + lift

    def _recode(self, start: int, stop: int, gradient: Tensor) -> Tensor:
        """Set the best code of each column in [start, stop), one after another; returns the change of Ŵ.

        gradient: float32 [stop − start, out], G of these columns; overwritten.
        """
        group, part = start // self.size, slice(start, stop)
        scale, scheme = self.scale[group], self.q.scheme
        hessian = self.hessian[part, part]
        # An input that was always 0 has only the damping as curvature and gets the nearest code; with none it is
        # unchanged.
        steps = (self.curvature[part, None] * scale).reciprocal_().nan_to_num_(0, 0, 0)
        if self.kernels is not None and stop - start <= self.kernels.most:
            return self.kernels.move(gradient, hessian, scale.expand_as(steps), steps, self.points[part])
        moved = torch.empty_like(gradient)
        for k in range(stop - start):
            points = self.points[start + k]
            wanted = gradient[k].mul_(steps[k]).add_(points)
            change = self.rounding.nearest(wanted, None, scheme).sub_(points)
            points += change
            torch.mul(change, scale, out=moved[k])
            compensate(gradient, hessian, moved, k)
        return moved
