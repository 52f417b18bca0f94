"""Vector quantization: a group of weights of a row shares codes, each of which selects an entry of a learned codebook.

Ŵ[i, group j] = sᵢ Σₘ Cₘ[code(i, j, m)], with a scale for each row and M codebooks for the whole matrix (AQLM,
Egiazarian et al. 2024, arXiv:2401.06118, §3). As in GPTQ, tr((W − Ŵ) H (W − Ŵ)ᵀ) is minimized. The first codebooks are
found by k-means (`grids.vq`). Then codes, scales and codebooks take turns:

- codes are chosen group by group, with each error fed forward into later groups (GPTVQ, van Baalen et al. 2024,
  arXiv:2402.15319, algorithm 1). With UᵀU = H⁻¹, rounding group j by e = w − ŵ costs ‖e U[j,j]⁻¹‖²: so U[j,j]⁻¹ maps
  weights to coordinates in which the nearest sum of entries is the best, and wₗ ← wₗ − e U[j,j]⁻¹ U[j,l] makes up for e
  in later groups l. After a few turns they are improved instead, each group with all others fixed (coordinate descent);
- scales have a closed form;
- codebooks are fitted by least squares (conjugate gradients: the objective is quadratic in them; AQLM, §3.3), to some
  of the rows where there are many.

A turn that does not lower the objective is undone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.grids.vector_search import search, total
from llmq.grids.vq import VQWeight, first_books, row_scale
from llmq.numerics.gptq import factorize

COLUMNS = 128
"""Columns whose changes are applied to all others by one product."""
FORWARD = 3
"""Turns in which all codes are chosen anew, at most."""
STEPS = 4
"""Of conjugate gradients, in each turn."""
FITTED = 1 << 17
"""How many vectors are enough to fit codebooks."""
EXACT = 1e-10
"""The share of the start's squared gradient below which it is float32's noise."""
LEAST = 1e-3
"""The share by which a turn must lower the objective for another one."""


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    rounds: int = 4,
    beam: int = 8,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> VQWeight:
    """Quantize a weight with the least change of the layer's output on the calibration text.

    weight: any float [out, in]; hessian: float32 [in, in]; scheme: of a grid of vectors; damping: fraction of the mean
    of H's diagonal that is added to it; rounds: turns of descent, at most; beam: sums that are kept from codebook to
    codebook. If H is not positive definite with this damping, codes are chosen once, and `notes` say what was done.
    Raises LlmqError if the weight or the Hessian is not finite, or the group size does not divide the inputs. Besides
    the Hessian, two float32 [in, in] matrices are used, and five of the weight's size.
    """
    width, size = weight.shape[1], scheme.group_size
    assert size is not None
    if width == 0 or width % size:
        raise LlmqError(f"group size {size} does not divide the {width} inputs of the weight")
    if tuple(hessian.shape) != (width, width):
        raise LlmqError(f"a weight with {width} inputs needs a Hessian [{width}, {width}], not {[*hessian.shape]}")
    if not bool(torch.isfinite(hessian).all()):
        raise LlmqError(
            "the Hessian holds values that are not finite: an activation overflowed on the calibration text"
        )
    scale = row_scale(weight, scale_dtype)
    diagonal = hessian.diagonal().to(torch.float32).clone()
    order = torch.argsort(diagonal.view(-1, size).sum(1), descending=True, stable=True)
    columns = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    factor, notes = factorize(hessian, columns, damping)
    if factor is None:
        factor = torch.eye(width, device=weight.device)
    importance = torch.empty_like(diagonal).index_copy_(0, columns, factor.diagonal() ** -2)
    importance[diagonal <= 0] = 0
    books = first_books(weight, scale, importance, scheme, scale_dtype)
    state = _Vectors(weight, scale, books, beam)
    state.feed_forward(factor, order)
    if not notes and not bool(hessian[diagonal <= 0].any()):
        mean = float(diagonal.mean())
        hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
        try:
            least, gradient = state.gradient(hessian)

            def anew() -> tuple[float, Tensor]:
                state.feed_forward(factor, order)
                return state.gradient(hessian)

            least, gradient = state.turns(hessian, anew, FORWARD, least, gradient)
            del factor
            state.turns(hessian, lambda: state.descend(hessian), rounds, least, gradient)
        finally:
            hessian.diagonal().copy_(diagonal)
    return state.result(scheme, notes)


class _Vectors:
    """A weight's codes, codebooks and scales while they change; weights are transposed, [in, out].

    codes: uint8 [groups, out, M]; books: float32 [M, entries, size] and scale: float32 [out], with values that can be
    stored.
    """

    def __init__(self, weight: Tensor, scale: Tensor, books: Tensor, beam: int) -> None:
        rows, self.width = weight.shape
        self.weight = torch.empty(self.width, rows, device=weight.device).copy_(weight.t())
        self.dtype, self.scale, self.books, self.beam = scale.dtype, scale.float(), books.float(), beam
        self.size = books.shape[2]
        self.some = slice(None, None, max(1, weight.numel() // (self.size * FITTED)))
        self.codes = torch.empty(self.width // self.size, rows, len(books), dtype=torch.uint8, device=weight.device)

    def result(self, scheme: Scheme, notes: tuple[str, ...]) -> VQWeight:
        """The weight in its stored form."""
        codes = self.codes.transpose(0, 1).contiguous()
        return VQWeight(codes, self.books.to(self.dtype), self.scale.to(self.dtype), scheme, notes)

    def feed_forward(self, unit: Tensor, order: Tensor) -> None:
        """Choose all codes, group by group in this order, each error fed into later groups. unit: U, in that order."""
        size, width = self.size, self.width
        columns = self.weight.view(-1, size, self.weight.shape[1])[order].flatten(0, 1)
        eye = torch.eye(size, device=unit.device)
        step = max(size, COLUMNS // size * size)
        for start in range(0, width, step):
            stop = min(start + step, width)
            errors = torch.empty_like(columns[start:stop])
            for first in range(start, stop, size):
                last = first + size
                back = torch.linalg.solve_triangular(unit[first:last, first:last], eye, upper=True)
                here = columns[first:last]
                found = search((here / self.scale).t() @ back, self.books @ back, self.beam)
                self.codes[order[first // size]] = found.to(torch.uint8)
                error = back.t() @ (here - total(self.books, found).t() * self.scale)
                errors[first - start : last - start] = error
                columns[last:stop].addmm_(unit[first:last, last:stop].t(), error, alpha=-1)
            if stop < width:
                columns[stop:].addmm_(unit[start:stop, stop:].t(), errors, alpha=-1)

    def turns(
        self, hessian: Tensor, choose: Callable[[], tuple[float, Tensor]], count: int, least: float, gradient: Tensor
    ) -> tuple[float, Tensor]:
        """Set scales, codebooks and, by `choose`, codes, `count` times or until that no longer helps.

        hessian: with damping; choose: returns what `gradient` does; least, gradient: the same, before and as returned.
        """
        for _ in range(count):
            before = least
            kept = self.codes.clone(), self.books, self.scale
            self._rescale(hessian, gradient.clone())
            now, fresh = choose()
            if not now < least:
                self.codes, self.books, self.scale = kept
                break
            least, gradient = now, fresh
            if least > before * (1 - LEAST):
                break
        return least, gradient

    def gradient(self, hessian: Tensor) -> tuple[float, Tensor]:
        """The objective, and H (W − Ŵ), float32 [in, out]."""
        left = self._left()
        gradient = hessian @ left
        return float(left.mul_(gradient).sum(dtype=torch.float64)), gradient

    def _left(self) -> Tensor:
        """W − Ŵ, float32 [in, out]."""
        return torch.addcmul(self.weight, self._values(self.books, self.codes), self.scale, value=-1)

    def descend(self, hessian: Tensor) -> tuple[float, Tensor]:
        """Set the codes of each group to the best that are found with all others fixed; returns what `gradient` does.

        With G = H (W − Ŵ), the best values of group j are ŵ + H[j,j]⁻¹ G[j], and errors count by H[j,j].
        """
        size, gradient = self.size, self.gradient(hessian)[1]
        step = max(size, COLUMNS // size * size)
        for start in range(0, self.width, step):
            block = slice(start, min(start + step, self.width))
            local = gradient[block].clone()
            moved = torch.empty_like(local)
            for first in range(0, len(local), size):
                group, here, later = (start + first) // size, slice(first, first + size), slice(first + size, None)
                near = hessian[block, block][here]
                root = torch.linalg.cholesky(near[:, here])
                old = self.codes[group].int()
                sums = total(self.books, old)
                away = torch.cholesky_solve(local[here], root).div_(self.scale)
                found = search((sums + away.t()) @ root, self.books @ root, self.beam, old)
                self.codes[group] = found.to(torch.uint8)
                torch.mul((total(self.books, found) - sums).t(), self.scale, out=moved[here])
                local[later].addmm_(near[:, later].t(), moved[here], alpha=-1)
            gradient.addmm_(hessian[:, block], moved, alpha=-1)
        return float(self._left().mul_(gradient).sum(dtype=torch.float64)), gradient

    def _values(self, books: Tensor, codes: Tensor) -> Tensor:
        """The sums of chosen entries of any codebooks, float32 [in, rows]. codes: uint8 [groups, rows, M]."""
        made = torch.empty(self.width, codes.shape[1], device=codes.device)
        for group, part in zip(codes, made.view(-1, self.size, codes.shape[1]), strict=True):
            part.copy_(total(books, group.int()).t())
        return made

    def _uses(self, values: Tensor, codes: Tensor) -> Tensor:
        """The sum of values [in, rows] over all uses of each entry, float32 [M, entries, size]: the transpose of what
        `_values` does."""
        sums = torch.zeros_like(self.books)
        for group, part in zip(codes, values.view(-1, self.size, codes.shape[1]), strict=True):
            rows, entries = part.t().contiguous(), group.int()
            for number, book in enumerate(sums):
                book.index_add_(0, entries[:, number], rows)
        return sums

    def _rescale(self, hessian: Tensor, gradient: Tensor) -> None:
        """Set each row's best scale, then the best codebooks. gradient: changed."""
        values = self._values(self.books, self.codes)
        bent = hessian @ values
        best = self.scale + (values * gradient).sum(0) / values.mul_(bent).sum(0)
        info = torch.finfo(self.dtype)
        fine = torch.isfinite(best) & (best >= info.tiny) & (best <= info.max)
        scale = torch.where(fine, best, self.scale).to(self.dtype).float()
        gradient.addcmul_(bent, scale - self.scale, value=-1)
        self.scale = scale
        del values, bent
        self._refit(hessian, gradient)

    def _refit(self, hessian: Tensor, gradient: Tensor) -> None:
        """Conjugate gradients on the entries of all codebooks, each divided by the objective's own curvature."""
        codes, scale = self.codes[:, self.some].contiguous(), self.scale[self.some]
        left = self._uses(gradient[:, self.some] * scale, codes)
        curvature = self._uses(hessian.diagonal()[:, None] * scale.square(), codes)
        divided = torch.where(curvature > 0, 1 / curvature, 0.0)
        change, toward = torch.zeros_like(left), divided * left
        length = first = float((left * toward).sum(dtype=torch.float64))
        for _ in range(STEPS):
            along = self._uses((hessian @ self._values(toward, codes).mul_(scale)).mul_(scale), codes)
            bend = float((toward * along).sum(dtype=torch.float64))
            if not bend > 0 or length < EXACT * first:
                break
            change.add_(toward, alpha=length / bend)
            left.sub_(along, alpha=length / bend)
            fresh = divided * left
            before, length = length, float((left * fresh).sum(dtype=torch.float64))
            toward = fresh.add_(toward, alpha=length / before)
        books = (self.books + change).to(self.dtype).float()
        self.books = torch.where(torch.isfinite(books), books, self.books)
