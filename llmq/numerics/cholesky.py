"""The inverse of a Cholesky factor, and products with it, by matrix products.

LAPACK's routines for triangles run at half the speed of a matrix product or less, so the factorization is one by
halves: with A = [[A₁, Bᵀ], [B, A₂]], L = [[L₁, 0], [L₂₁, L₂]] and X = L⁻¹,

    L₂₁ = B X₁ᵀ,    L₂ L₂ᵀ = A₂ − L₂₁ L₂₁ᵀ,    X₂₁ = −X₂ L₂₁ X₁,

where X₁ and X₂ are found in the same way (Higham 2002, Accuracy and Stability of Numerical Algorithms, §10.1 and
§14.2), and a product with a triangle is cut into strips that leave its zeros out.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 256
"""The size from which on a matrix is halved."""
STRIP = 512
"""The rows or columns of a triangle that are multiplied at once."""


def invert_factor(matrix: Tensor) -> bool:
    """Replace a symmetric matrix A = L Lᵀ by L⁻¹, lower triangular; False if it has no factor, which leaves no result.

    matrix: float32 [n, n], of which only the lower triangle is read. Besides, strips of it are used.
    """
    size = len(matrix)
    if size <= SMALL:
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
            return False
        unit = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return True
    half = size // 2
    first, second, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    if not invert_factor(first):
        return False
    times_upper(below, first, out=below)
    for start in range(0, len(second), STRIP):
        strip = slice(start, start + STRIP)
        second[start:, strip].addmm_(below[start:], below[strip].t(), alpha=-1)
    if not invert_factor(second):
        return False
    times_lower(below, first, out=below).neg_()
    for stop in range(len(second), 0, -STRIP):
        strip = slice(max(0, stop - STRIP), stop)
        below[strip] = second[strip, :stop] @ below[:stop]
    matrix[:half, half:] = 0
    return True


def solve(rows: Tensor, inverse: Tensor) -> Tensor:
    """R (L Lᵀ)⁻¹ of rows R, float32 [rows, n], for L⁻¹ of `invert_factor`."""
    half = times_upper(rows, inverse)
    return times_lower(half, inverse, out=half)


def times_lower(rows: Tensor, lower: Tensor, out: Tensor | None = None) -> Tensor:
    """R X for a lower triangular X: [rows, n]. out: where to, which may be R itself."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if out is None else out
    for start in range(0, len(lower), STRIP):
        strip = slice(start, start + STRIP)
        # What is multiplied later has columns to the right of these.
        out[:, strip] = rows[:, start:] @ lower[start:, strip]
    return out


def times_upper(rows: Tensor, lower: Tensor, out: Tensor | None = None) -> Tensor:
    """R Xᵀ for a lower triangular X: [rows, n]. out: where to, which may be R itself."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if out is None else out
    for start in reversed(range(0, len(lower), STRIP)):
        stop = min(start + STRIP, len(lower))
        # What is multiplied later has columns to the left of these.
        out[:, start:stop] = rows[:, :stop] @ lower[start:stop, :stop].t()
    return out
