"""Weights trained through their rounding: a float weight and the size of each group's steps, by gradients.

With p the grid's point that is nearest to u = w / s + zero, the rounded weight is ŵ = s · (p − zero). Its gradients are
estimated; inside the grid's range, w gets ∂L/∂ŵ · φ'(u), and s gets Σ over the group of ∂L/∂ŵ · (φ(u) − zero − (u −
zero) · φ'(u)), where φ stands for the rounding:

- `ste`: φ' = 1 and φ(u) = p: LSQ (Esser et al. 2019, arXiv:1902.08153, equation 3), straight through for w.
- `dsq`: φ is a tanh between each two neighbouring points (Gong et al. 2019, arXiv:1908.05033, equations 3 to 5), which
  is steep near the threshold: weights in the middle of their cell move less.

Beyond the range, w gets 0 and s gets p − zero. Both are trained by Adam, w in units of the starting step. Adam does not
depend on the size of gradients, so that LSQ's factor for those of s, which makes one rate fit both, is not needed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from llmq.grids.base import QuantizedWeight

SHARPNESS = 4.0
"""DSQ's k times the distance of two points."""
BETAS, EPSILON = (0.9, 0.99), 1e-30


class Adam:
    """Adam's step for one tensor (Kingma and Ba 2014, arXiv:1412.6980). Uses two tensors of its size, float32."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, gradient: Tensor) -> Tensor:
        """What to subtract at rate 1; the gradient [as `like`] is left alone."""
        self.count += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        root = (self.square / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPSILON)
        return (self.mean / (1 - BETAS[0] ** self.count)).div_(root)


class TrainedWeight:
    """A quantized weight whose float weight and steps are trained.

    q: the starting point, kept exactly; weight: any float [out, in], the original: where it rounds to the code of `q`,
    training starts there, else in the middle of the code's cell. Uses five float32 matrices of the weight's size.
    """

    def __init__(self, q: QuantizedWeight, weight: Tensor, estimator: str = "ste") -> None:
        self.q, self.rounding, self.estimator = q, q.rounding, estimator
        self.base = q.scale.to(torch.float32).unsqueeze(-1)
        self.factor = torch.ones_like(self.base)
        self.zero = None if q.zero is None else q.zero.to(torch.float32).unsqueeze(-1)
        start = self.rounding.decode(q.codes, q.scheme).to(torch.float32).view(*self.base.shape[:2], -1)
        self.levels = self.rounding.levels(q.scheme, start.device)
        middle = start if self.zero is None else start - self.zero
        latent = weight.to(torch.float32).view_as(start) / self.base
        inside = self._nearest(latent) == start
        # In units of the starting step, without the zero point.
        self.latent = torch.where(inside & torch.isfinite(latent), latent, middle)
        self.moments, self.scale_moments = Adam(self.latent), Adam(self.factor)

    def _nearest(self, latent: Tensor) -> Tensor:
        return self.rounding.nearest(latent.clone(), self.zero, self.q.scheme)

    def scale(self) -> Tensor:
        """The scales in their stored precision, float32 [out, groups, 1]: finite, normal, with unchanged sign."""
        return self.rounding.storable(self.base * self.factor, self.q.scale.dtype)

    def _scaled(self) -> Tensor:
        """w / s, float32 [out, groups, size]."""
        return self.latent * (self.base / self.scale())

    def points(self) -> Tensor:
        """The current points of the grid, float32 [out, groups, size]."""
        return self._nearest(self._scaled())

    def value(self, out: Tensor, share: float = 0.0) -> None:
        """Write the rounded weight to `out` [out, in], rounded once to its dtype; share: of the float weight in it."""
        levels = self.points()
        if self.zero is not None:
            levels -= self.zero
        if share:
            levels.lerp_(self._scaled(), share)
        out.copy_(levels.mul_(self.scale()).flatten(1))

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """For ∂L/∂ŵ [out, in], any float: those of the float weight, in units of the starting step, [out, groups,
        size], and of the scales' factors [out, groups, 1]."""
        slope = gradient.to(torch.float32).view_as(self.latent)
        scaled = self._scaled()
        points = self._nearest(scaled)
        whole = scaled if self.zero is None else scaled + self.zero
        lowest, highest = (self.levels[..., end].view(-1, 1, 1) for end in (0, -1))
        inside = (whole >= lowest) & (whole <= highest)
        if self.estimator == "dsq":
            soft, rise = soft_points(whole, self.levels)
        else:
            soft, rise = points, torch.ones_like(points)
        rise = torch.where(inside, rise, 0.0)
        soft = torch.where(inside, soft, points)
        if self.zero is not None:
            soft = soft - self.zero
        pull = (slope * (soft - scaled * rise)).sum(-1, keepdim=True)
        return slope * rise * self.base, pull * self.base

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step of Adam against ∂L/∂ŵ [out, in]: weights by `rate` starting steps, factors by `scale_rate`."""
        slope, pull = self.gradients(gradient)
        self.latent.sub_(self.moments.step(slope), alpha=rate)
        if self.q.stored_scale is None:  # quantized scales are fixed
            self.factor.sub_(self.scale_moments.step(pull), alpha=scale_rate).clamp_(0.1, 10)

    def quantized(self) -> QuantizedWeight:
        """The current quantized weight."""
        codes = self.rounding.encode(self.points().flatten(1), self.q.scheme)
        if self.q.stored_scale is not None:
            return replace(self.q, codes=codes)
        return replace(self.q, codes=codes, scale=self.scale().squeeze(-1).to(self.q.scale.dtype))


def soft_points(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """DSQ's soft rounding of values within the range of the levels (float32, ascending), and its derivative.

    levels: [points], or [out, points] for values [out, groups, size].

    Between two levels it is their middle plus half their distance · tanh(k · x) / tanh(k / 2), where x is the distance
    from the middle in units of that of the levels: it meets the levels themselves.
    """
    table = levels.view(-1, levels.shape[-1])
    above = torch.searchsorted(table, values.reshape(len(table), -1), right=True).clamp_(1, levels.shape[-1] - 1)
    low, high = (table.gather(1, index).view_as(values) for index in (above - 1, above))
    step = high - low
    # Levels that are learned may coincide.
    bent = torch.tanh(SHARPNESS * (torch.where(step > 0, (values - low) / step, 0.5) - 0.5))
    full = math.tanh(SHARPNESS / 2)
    return (low + high) / 2 + step / 2 * bent / full, SHARPNESS / 2 * (1 - bent.square()) / full
