"""Correct a weight, before it is rounded, for what the rounding of earlier weights did to its inputs.

A weight W gets inputs X̂ from weights that are rounded already, where those of the unquantized model are X. Its output
is added to a residual stream, which is R̂ and was R. With Ĥ = X̂ᵀX̂, the weight that comes nearest to the unquantized sum,

    min ‖X̂ W'ᵀ + R̂ − (X Wᵀ + R)‖²,   is   W' = W + [W (X − X̂)ᵀX̂ + (R − R̂)ᵀX̂] (Ĥ + λ)⁻¹,

and a quantizer then rounds W' by Ĥ as it would round W. The first term is that of QEP (Arai and Ichikawa 2025,
arXiv:2504.09629, proposition 2) and GPTAQ (Li et al. 2025, arXiv:2504.02692, §4), the second follows LoaQ (2025,
arXiv:2509.06297). Both fit the calibration text, and what fits its noise is wrong elsewhere: each term has a strength
between 0 and 1, chosen on windows that the sums do not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.numerics.cholesky import invert_factor, solve
from llmq.spill import rest_one

STEPS = 8
"""Strengths are multiples of one part in this many."""
DAMPINGS = 4
STRIP = 512
"""The rows that are copied at once, so that a matrix and its copy need not be in memory together."""


def factor(hessian: Tensor, damping: float) -> Tensor | None:
    """The inverse of the Cholesky factor of Ĥ + λ, lower, float32 [in, in]; None without one, even with λ raised.

    hessian: float32 [in, in]; damping: λ as a fraction of mean(diag Ĥ), raised tenfold up to 4 times.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None
    for attempt in range(DAMPINGS + 1):
        lower = torch.empty_like(hessian)
        for start in range(0, len(hessian), STRIP):
            strip = slice(start, start + STRIP)
            lower[strip] = hessian[strip]
            rest_one(hessian[strip])
        lower.diagonal().add_(mean * damping * 10**attempt)
        if invert_factor(lower):
            return lower
    return None


def change(moment: Tensor, inverse: Tensor) -> Tensor:
    """M (Ĥ + λ)⁻¹, float32 [out, in], for a moment M [out, in] and the result of `factor`."""
    return solve(moment, inverse)


class Fit:
    """The least squares fit of the strengths of changes to what they should make, over rows that are added in turn.

    The changes of the output, with strength 1, are U₁ … Uₙ; wanted is G; the error is ‖Σ sᵢ Uᵢ − G‖².
    """

    def __init__(self, count: int) -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.wanted = torch.zeros(count, dtype=torch.float64)

    def update(self, changes: Sequence[Tensor], wanted: Tensor) -> None:
        """Add rows: each change and what is wanted, [tokens, out], float32."""
        columns = torch.stack([one.flatten() for one in changes])
        self.products += (columns @ columns.t()).double().cpu()
        self.wanted += (columns @ wanted.flatten()).double().cpu()

    def strengths(self) -> tuple[float, ...]:
        """The strengths of least error among multiples of 1/8 from 0 to 1; of equal ones the smallest."""
        steps = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        tried = torch.cartesian_prod(*[steps] * len(self.wanted)).view(-1, len(self.wanted))
        errors = ((tried @ self.products) * tried).sum(1) - 2 * tried @ self.wanted
        if not bool(torch.isfinite(errors).all()):
            raise LlmqError("an activation overflowed on the calibration text")
        return tuple(tried[int(errors.argmin())].tolist())
