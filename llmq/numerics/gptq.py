"""GPTQ: round a weight column by column, compensating each column's error in the later columns.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1. For a layer with inputs x and H = E[x xᵀ], it minimizes tr((W − Ŵ) H
(W − Ŵ)ᵀ), the mean squared error of the layer's output, instead of Σ(w − ŵ)².

The recursion needs the upper triangular U with UᵀU = H⁻¹ (the paper's §3.3, step 3). It is computed without inverting
H: H = R Rᵀ with R upper triangular (a Cholesky factorization from the last row upwards), and U = R⁻¹, which costs half
as much and is more accurate in float32 (see `cholesky`). Then, for each column k,

    ŵₖ = nearest grid point to wₖ,      wⱼ ← wⱼ − (wₖ − ŵₖ) U[k,j] / U[k,k]  for j > k,

which raises the objective by exactly ‖wₖ − ŵₖ‖² / U[k,k]²: so 1 / U[k,k]² is the columns' importance in range search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, check_range, joined, pieces, rounded_on, rounding_of
from llmq.grids.scheme import Scheme
from llmq.numerics.cholesky import invert_factor
from llmq.numerics.columns import Kernels, compensate, kernels_for
from llmq.numerics.descent import improve
from llmq.spill import rest_one

DAMPINGS = 4
ACT_ORDERS = ("none", "static", "grouped")


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    range_method: str = "weighted",
    act_order: str = "static",
    damping: float = 0.01,
    block_size: int = 128,
    sweeps: int = 0,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """Quantize a weight with the least change of the layer's output on the calibration text.

    weight: any float [out, in], not modified; hessian: float [in, in], symmetric: the mean of x xᵀ over tokens, up to a
    factor; range_method: one of the grid's ranges. act_order: 'none' processes columns in their order and finds each
    group's range on reaching it, from the compensated weights; 'static' processes columns by descending diag(H), with
    all ranges found beforehand; 'grouped' processes groups by descending Σ diag(H), and the columns in them by
    descending diag(H), and finds each group's range on reaching it. Groups are always consecutive inputs: no
    permutation is stored. Scales that are quantized themselves are all found beforehand. damping: the fraction of
    mean(diag H) added to the diagonal; block_size: columns between updates of all later columns; sweeps: how often
    scales and codes are improved afterwards (see `descent`; 0 is the paper's GPTQ).

    Columns of inputs that were always 0 (diag H = 0) are rounded to nearest, without any compensation. If H has no
    Cholesky factor, damping is raised tenfold up to 4 times, then eigenvalues are clipped, and if that fails the weight
    is rounded to nearest; each is reported in `notes`. There are no sweeps after plain rounding, or if an input with
    diag H = 0 has nonzero entries in H: the objective then has no minimum, and descent may end far from the weight.
    Raises LlmqError for a weight or Hessian that is not finite, or unknown options. Besides the Hessian, two float32
    [in, in] matrices are used, more when eigenvalues are clipped. Where rows can be rounded apart, a CPU rounds them
    some at a time (`pieces`).
    """
    rows, width = weight.shape
    check_range(range_method, scheme, width)
    if act_order not in ACT_ORDERS:
        raise LlmqError(f"act_order must be one of {', '.join(ACT_ORDERS)}, not {act_order!r}")
    if tuple(hessian.shape) != (width, width):
        raise LlmqError(f"a weight with {width} inputs needs a Hessian [{width}, {width}], not {[*hessian.shape]}")
    if not _finite(weight):
        raise LlmqError("the weight holds values that are not finite")
    if not _finite(hessian):
        raise LlmqError(
            "the Hessian holds values that are not finite: an activation overflowed on the calibration text"
        )
    diagonal = hessian.diagonal().to(torch.float32).clone()
    importance = diagonal.clamp_min(0)
    order = _order(diagonal, scheme, act_order)
    factor, notes = factorize(hessian, order, damping)
    if factor is None:
        rounding = rounding_of(scheme.rules).fitted(weight, scheme, range_method, importance, scale_dtype)
        scale, zero = rounding.find_scale(weight, scheme, range_method, importance, scale_dtype)
        return rounded_on(weight, scale, zero, scheme, notes, rounding.learned)
    pivots = factor.diagonal() ** -2
    factor /= factor.diagonal().clone()[:, None]
    pivots[(diagonal if order is None else diagonal[order]) <= 0] = 0
    rowwise = pieces(rows, scheme, weight.device)
    found = []
    for part in rowwise:
        solved = _Columns(weight[part], factor, order, scheme, range_method, pivots, scale_dtype)
        if act_order == "static" or scheme.double_quant:
            solved.range_all()
        found.append(replace(solved.run(block_size), notes=notes))
        del solved
    del factor
    if not notes and not bool(hessian[diagonal <= 0].any()):
        for n, part in enumerate(rowwise):
            found[n] = improve(found[n], weight[part], hessian, sweeps=sweeps, damping=damping, block_size=block_size)
    return joined(found)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, by the extremes alone, which are not if any value is not a number."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def _order(diagonal: Tensor, scheme: Scheme, act_order: str) -> Tensor | None:
    """The processing order of the columns, int64 [in], or None for their own order."""
    if act_order == "none":
        return None
    falling = torch.argsort(diagonal, descending=True, stable=True)
    if act_order == "static" or scheme.group_size is None:
        return falling
    groups = diagonal.view(-1, scheme.rules.span or scheme.group_size)
    columns = torch.arange(len(diagonal), device=diagonal.device).view_as(groups)
    inside = columns.gather(1, torch.argsort(groups, dim=1, descending=True, stable=True))
    return inside[torch.argsort(groups.sum(1), descending=True, stable=True)].flatten()


def factorize(hessian: Tensor, order: Tensor | None, damping: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with UᵀU = (H + damping)⁻¹, in the given order of columns, and notes on fallbacks.

    hessian: float [in, in]; order: int64 [in] or None. Returns float32 [in, in] with zeros below the
    diagonal, or None if all fallbacks failed.
    """
    width = hessian.shape[0]
    diagonal = hessian.diagonal().to(torch.float32)
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    notes: list[str] = []
    # H = R Rᵀ is, mirrored in both axes, the Cholesky factorization L Lᵀ of the mirrored H.
    order = torch.arange(width, device=hessian.device) if order is None else order
    mirror = order.flip(0)
    amount = damping
    for attempt in range(DAMPINGS + 1):
        lower = _mirrored(hessian, mirror, dead, amount * mean)
        if invert_factor(lower):
            if attempt:
                notes.append(f"the Hessian was not positive definite: damping raised from {damping:g} to {amount:g}")
            return _turn(lower), tuple(notes)
        amount = max(amount, 1e-3) * 10
    found = f"the Hessian was not positive definite with damping {amount / 10:g}"
    try:
        values, vectors = torch.linalg.eigh(_mirrored(hessian, mirror, dead, 0.0))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # No convergence, or too wide for LAPACK.
        reason = str(error).partition("\n")[0]
        return None, (f"{found} and its eigenvalues were not found ({reason}): rounded to nearest instead of GPTQ",)
    values.clamp_(min=max(damping, 1e-3) * mean)
    notes.append(f"{found}: its eigenvalues were clipped")
    lower = (vectors * values) @ vectors.t()
    if invert_factor(lower):
        return _turn(lower), tuple(notes)
    notes.append("clipping its eigenvalues did not help: rounded to nearest instead of GPTQ")
    return None, tuple(notes)


def _mirrored(hessian: Tensor, mirror: Tensor, dead: Tensor, amount: float) -> Tensor:
    """A float32 copy of H in mirrored order, dead inputs decoupled, `amount` added to the diagonal."""
    copy = torch.empty(hessian.shape, device=hessian.device)
    for start in range(0, len(mirror), 256):
        copy[start : start + 256] = hessian[mirror[start : start + 256]][:, mirror]
        rest_one(hessian)
    gone = dead[mirror]
    if bool(gone.any()):
        copy[gone] = 0
        copy[:, gone] = 0
        copy.diagonal()[gone] = 1
    copy.diagonal().add_(amount)
    return copy


def _turn(matrix: Tensor) -> Tensor:
    """Reverse both axes of a square matrix, in place."""
    size = len(matrix)
    for start in range(0, size // 2, 256):
        stop = min(start + 256, size // 2)
        first = matrix[start:stop].flip(0, 1)
        matrix[start:stop] = matrix[size - stop : size - start].flip(0, 1)
        matrix[size - stop : size - start] = first
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)
    return matrix


class _Columns:
    """The column loop. Weights are transposed, [in, out] in processing order, so that a column is contiguous.

    w − ŵ takes the place of columns that are finished.
    """

    def __init__(
        self,
        weight: Tensor,
        unit: Tensor,
        order: Tensor | None,
        scheme: Scheme,
        range_method: str,
        importance: Tensor,
        scale_dtype: torch.dtype,
    ) -> None:
        self.scheme, self.unit, self.order, self.range_method = scheme, unit, order, range_method
        self.weight, self.importance, self.scale_dtype = weight, importance, scale_dtype
        rows, self.width = weight.shape
        self.size = scheme.group_size or self.width
        self.span = scheme.rules.span or self.size
        ordered = weight.t() if order is None else weight.t()[order]
        self.columns = torch.empty(self.width, rows, device=weight.device).copy_(ordered)
        self.rounding = rounding_of(scheme.rules).fitted(
            weight, scheme, range_method, self._of_inputs(importance), scale_dtype
        )
        self.codes = torch.empty(self.width, rows, dtype=self.rounding.code_dtype, device=weight.device)
        kept = self.rounding.scale_dtype or scale_dtype
        self.scale = torch.empty(rows, self.width // self.size, dtype=kept, device=weight.device)
        self.stored_scale: Any = None
        kept = self.rounding.zero_dtype
        self.zero = None if scheme.symmetric else torch.empty(self.scale.shape, dtype=kept, device=weight.device)
        self.ranged = False
        self.kernels = kernels_for(self.rounding, scheme, weight.device)

    def range_all(self) -> None:
        """Find all ranges at once, from the original weights, for an order that visits groups more than once."""
        scale, self.zero = self.rounding.find_scale(
            self.weight, self.scheme, self.range_method, self._of_inputs(self.importance), self.scale_dtype
        )
        self.scale, self.zero, self.stored_scale = self.rounding.settle(scale, self.zero, self.scheme)
        self.ranged = True

    def _of_inputs(self, values: Tensor) -> Tensor:
        """Values of the columns [in] in processing order, in the order of the inputs."""
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)

    def run(self, block_size: int) -> QuantizedWeight:
        """Process all blocks of columns, left to right."""
        bounds = self._bounds(block_size)
        for start, stop in zip(bounds, bounds[1:], strict=False):
            # What becomes of a block of columns for all before it, in one long product; a span of several blocks whose
            # ranges are found on reaching it, when its first block is reached.
            whole = not self.ranged and self.span > block_size
            inside = start % self.span if whole else 0
            end = start + self.span if whole and not inside else stop
            before = slice(start - inside, start) if inside else slice(0, start)
            if start > before.start:
                unit = self.unit[before, start:end].t()
                self.columns[start:end].addmm_(unit, self.columns[before], alpha=-1)
            self.columns[start:stop] = self._block(start, stop)
        codes = self.codes
        if self.order is not None:
            # Copied as bytes, as codes of any dtype have one byte each.
            codes = torch.empty_like(codes)
            codes.view(torch.uint8).index_copy_(0, self.order, self.codes.view(torch.uint8))
        codes = codes.t().contiguous()
        if not self.ranged:
            self.scale, self.zero, self.stored_scale = self.rounding.settle(self.scale, self.zero, self.scheme)
        found = QuantizedWeight(codes, self.scale, self.zero, self.scheme, stored_scale=self.stored_scale)
        return replace(found, levels=self.rounding.learned)

    def _bounds(self, block_size: int) -> list[int]:
        """The boundaries of blocks; without an order at group boundaries, so that ranges see all earlier updates."""
        if self.ranged or self.span <= block_size:
            step = block_size if self.ranged else block_size // self.span * self.span
            return [*range(0, self.width, step), self.width]
        groups = range(0, self.width, self.span)
        return [*(group + inside for group in groups for inside in range(0, self.span, block_size)), self.width]

    def _block(self, start: int, stop: int) -> Tensor:
        """Round columns [start, stop) with compensation for those before; returns w − ŵ [stop − start, out]."""
        where = range(start, stop) if self.order is None else self.order[start:stop].tolist()
        if self.kernels is not None:
            return self._at_once(self.kernels, start, where)
        block = self.columns[start:stop]
        errors = torch.empty_like(block)
        unit = self.unit[start:stop, start:stop]
        rounding, scale, points = self.rounding, block, torch.empty_like(block)
        zero: Tensor | None = None
        held = -1
        for k, column in enumerate(where):
            group = column // self.size
            if not self.ranged and (start + k) % self.span == 0:
                self._range(column // self.span, start + k)
            if group != held:
                held = group
                scale = self.scale[:, group].to(torch.float32)
                if self.zero is not None:
                    zero = self.zero[:, group].to(torch.float32)
            point = rounding.nearest(block[k] / scale, zero, self.scheme)
            points[k] = point
            value = (point if zero is None else point.sub_(zero)).mul_(scale)
            torch.sub(block[k], value, out=errors[k])
            compensate(block, unit, errors, k)
        self.codes[start:stop] = rounding.encode(points.t().contiguous(), self.scheme).t()
        return errors

    def _at_once(self, kernels: Kernels, start: int, where: Sequence[int]) -> Tensor:
        """`_block` by kernels, some columns at a time: of one span, where its range is found on reaching it."""
        stop = start + len(where)
        block, unit = self.columns[start:stop], self.unit[start:stop, start:stop]
        points, errors = torch.empty_like(block), torch.empty_like(block)
        part = slice(0, 0)
        while (first := part.stop) < len(where):
            end = stop if self.ranged else (start + first) // self.span * self.span + self.span
            part = slice(first, min(first + kernels.most, end - start, len(where)))
            if not self.ranged and (start + first) % self.span == 0:
                self._range(where[first] // self.span, start + first)
            scale, zero = (self._of_columns(held, where[part]) for held in (self.scale, self.zero))
            assert scale is not None
            points[part], errors[part] = kernels.round(block[part], unit[part, part], scale, zero)
            if part.stop < len(where):
                block[part.stop :].addmm_(unit[part, part.stop :].t(), errors[part], alpha=-1)
        self.codes[start:stop] = self.rounding.encode(points.t().contiguous(), self.scheme).t()
        return errors

    def _of_columns(self, held: Tensor | None, where: Sequence[int]) -> Tensor | None:
        """The scales or zero points of some columns, float32 [columns, out]."""
        if held is None:
            return None
        groups = [column // self.size for column in where]
        if len(set(groups)) == 1:
            return held[:, groups[0]].to(torch.float32).contiguous().expand(len(groups), -1)
        return held[:, groups].t().to(torch.float32).contiguous()

    def _range(self, number: int, column: int) -> None:
        """Find the ranges of the groups that are found together, the first of which begins at `column`, from their
        compensated weights. number: of the inputs that they have."""
        here = slice(column, column + self.span)
        # The order of inputs within a group does not matter, that of groups does.
        columns, importance = self.columns[here], self.importance[here]
        if self.order is not None and self.span > self.size:
            place = torch.argsort(self.order[here])
            columns, importance = columns[place], importance[place]
        current = columns.t().contiguous()
        scale, zero = self.rounding.find_scale(current, self.scheme, self.range_method, importance, self.scale_dtype)
        count = self.span // self.size
        groups = slice(number * count, (number + 1) * count)
        self.scale[:, groups] = scale
        if self.zero is not None and zero is not None:
            self.zero[:, groups] = zero
