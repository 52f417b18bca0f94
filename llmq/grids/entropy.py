"""TensorRT's entropy calibration: the clip whose quantized histogram has the least KL divergence from the original.

Migacz 2017, "8-bit inference with TensorRT" (GTC): of a histogram of |x|, keep the first i bins, add the counts beyond
them to the last kept bin (P); merge the kept bins, without the counts beyond, into as many cells as the grid has
levels, and spread each cell evenly over its nonempty bins (Q). The clip is the i of least KL(P ‖ Q).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Lower bound of Q where P is not 0, as a fraction of an even spread: for a bin that holds only clipped counts."""
BLOCK = 1 << 20


def entropy_clip(counts: Tensor, kept: Tensor, cells: Tensor) -> Tensor:
    """The index into `kept` of the clip with the least divergence, int64 []; of ties the largest clip.

    counts: float64 [bins]; kept: int64 [candidates], the number of bins that each keeps (1…bins); cells: int64
    [candidates, bins], the cell index of each bin, from 0 (ignored for bins that are not kept).
    """
    bins = len(counts)
    step = max(1, BLOCK // bins)
    found = [
        _divergence(counts, kept[start : start + step], cells[start : start + step])
        for start in range(0, len(kept), step)
    ]
    divergence = torch.cat(found)
    # Rounding noise must not decide between clips of equal divergence.
    near = divergence <= divergence.min() * (1 + 1e-9) + 1e-12
    return torch.where(near, kept, -1).argmax()


def even_cells(kept: Tensor, bins: int, levels: int) -> Tensor:
    """Cells of a uniform grid: with i bins kept, bin j is in cell ⌊j · levels / i⌋. int64 [candidates, bins]."""
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
