"""TensorRT's entropy calibration: the clip whose rounded histogram tells least from the original.

Migacz 2017, "8-bit inference with TensorRT" (GTC): of a histogram of |x|, keep the first i bins, put what lies beyond
into the last of them (P); merge the kept bins, without what lies beyond, into as many cells as the grid has levels,
and spread each cell evenly over those of its bins that are not empty (Q). The clip is the i of least KL(P ‖ Q).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""What Q is at least where P is not 0, as a share of an even spread: a bin that holds only what was clipped."""
BLOCK = 1 << 20


def entropy_clip(counts: Tensor, kept: Tensor, cells: Tensor) -> Tensor:
    """The index into `kept` of the clip of least divergence, int64 []; the longest of those that tie.

    counts: float64 [bins]; kept: int64 [candidates], how many bins each keeps (1…bins); cells: int64
    [candidates, bins], the cell that each bin falls into, from 0 (what it says of bins that are not kept is ignored).
    """
    bins = len(counts)
    step = max(1, BLOCK // bins)
    found = [
        _divergence(counts, kept[start : start + step], cells[start : start + step])
        for start in range(0, len(kept), step)
    ]
    divergence = torch.cat(found)
    # Rounding noise must not decide between clips that keep everything alike.
    near = divergence <= divergence.min() * (1 + 1e-9) + 1e-12
    return torch.where(near, kept, -1).argmax()


def even_cells(kept: Tensor, bins: int, levels: int) -> Tensor:
    """Cells of a uniform grid: bin j of i kept falls into cell ⌊j · levels / i⌋. int64 [candidates, bins]."""
    place = torch.arange(bins, device=kept.device)[None] * levels
    return place.div(kept[:, None], rounding_mode="floor").clamp_(max=levels - 1)


def _divergence(counts: Tensor, kept: Tensor, cells: Tensor) -> Tensor:
    """KL(P ‖ Q) of every candidate, float64 [candidates], in nats."""
    bins = len(counts)
    inside = torch.arange(bins, device=counts.device)[None] < kept[:, None]
    mass = torch.where(inside, counts[None], 0.0)
    last = (kept - 1)[:, None]
    beyond = counts.sum() - mass.sum(1, keepdim=True)
    p = mass.scatter_add(1, last, beyond)
    full = (mass > 0).to(torch.float64)
    total = torch.zeros_like(mass).scatter_add_(1, cells, mass)
    share = torch.zeros_like(mass).scatter_add_(1, cells, full)
    q = total.div_(share.clamp_min(1)).gather(1, cells).mul_(full)
    p = p / p.sum(1, keepdim=True)
    q = q / q.sum(1, keepdim=True).clamp_min(1e-300)
    q = torch.where(p > 0, q.clamp_min(EPSILON / bins), q)
    return torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log(), 0.0).sum(1)
