"""The best levels of each row, or of rows that share them, codes fixed: least squares on the layer's output.

With Q [in, levels] the one-hot codes of a row and w − ŵ its error, moving its levels by δ changes the objective
tr((W − Ŵ) H (W − Ŵ)ᵀ) by δᵀ (Qᵀ H Q) δ − 2 δᵀ Qᵀ H (w − ŵ), a parabola (LeanQuant, Zhang and Shrivastava 2024,
arXiv:2407.10032; LNQ of GuidedQuant, Kim et al. 2025, arXiv:2505.07004, equation 6). It is solved for some rows at a
time. The parabola of rows that share levels is the sum of theirs, each in units of its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 24
"""One-hot values that are multiplied by the Hessian at a time."""
RIDGE = 1e-6
"""Of the mean curvature of a row's levels, so that levels without codes do not move."""


def refit(
    codes: Tensor,
    levels: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    together: int = 1,
) -> Tensor:
    """The levels of least error, float32 [out, levels], rounded to `dtype` and ascending as they were.

    codes: [out, in], indices of levels; levels: float32 [out, levels]; gradient: float32 [in, out], H (W − Ŵ)ᵀ;
    hessian: float32 [in, in]; together: how many rows, from the first on, share levels; scale: float32 [out, 1], by
    which each row's levels are multiplied. A level without codes becomes equal to the one below it. Rows whose error
    would not fall, or whose levels would change their order, keep their levels.
    """
    rows, width = codes.shape
    count = levels.shape[1]
    found = levels.clone()
    step = max(1, CHUNK // (width * count * together)) * together
    for start in range(0, rows, step):
        part = slice(start, start + step)
        index = codes[part].to(torch.int64)
        chosen = torch.zeros(len(index), width, count, device=levels.device).scatter_(2, index.unsqueeze(-1), 1.0)
        some = chosen.transpose(0, 1).reshape(width, -1)
        bend = chosen.transpose(1, 2) @ (hessian @ some).view(width, len(index), count).transpose(0, 1)
        slope = (chosen.transpose(1, 2) @ gradient[:, part].t().unsqueeze(-1)).squeeze(-1)
        used = chosen.any(1)
        if scale is not None:
            bend, slope = bend * scale[part, :, None].square(), slope * scale[part]
        if together > 1:
            bend, slope, used = (_summed(value, together) for value in (bend, slope, used))
        held = levels[part][::together]
        ridge = bend.diagonal(dim1=1, dim2=2).mean(-1).mul_(RIDGE).clamp_min_(torch.finfo(torch.float32).tiny)
        solved, info = torch.linalg.solve_ex(bend + torch.diag_embed(ridge.unsqueeze(-1).expand(-1, count)), slope)
        moved = (held + solved).to(dtype).to(torch.float32)
        # A level without codes follows the one below it, and stands in nobody's way.
        below = torch.where(used, moved, moved.amin(1, keepdim=True)).cummax(1).values
        moved = torch.where(used, moved, below)
        shift = torch.where(used, moved - held, 0.0)
        gain = (shift * (2 * slope - (bend @ shift.unsqueeze(-1)).squeeze(-1))).sum(-1)
        better = (info == 0) & (gain > 0) & (moved[:, 1:] >= moved[:, :-1]).all(-1)
        best = torch.where(better.unsqueeze(-1), moved, held)
        found[part] = best if together == 1 else best.repeat_interleave(together, 0)[: len(index)]
    return found


def _summed(value: Tensor, together: int) -> Tensor:
    """The sums of so many rows at a time, the last of fewer; of booleans whether any is."""
    short = -len(value) % together
    padded = torch.cat([value, value.new_zeros(short, *value.shape[1:])]) if short else value
    parts = padded.view(-1, together, *value.shape[1:])
    return parts.any(1) if value.dtype == torch.bool else parts.sum(1)
