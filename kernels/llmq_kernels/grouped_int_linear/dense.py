"""Many rows: stacked weights are dequantized, some rows of all experts at a time, and multiplied by torch's grouped
product, which is for every expert the vendor's dense one. Nothing waits for the routing to be known on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmq_kernels.grouped_int_linear.route import Routing, sort
from llmq_kernels.products import Slabs, product_dtype
from llmq_kernels.weights import PackedInt

# Of the addresses of rows that torch's grouped product takes, in bytes.
ALIGNED = 16


def usable(x: Tensor, in_features: int) -> bool:
    """Whether torch's grouped product takes such rows without going expert by expert itself."""
    dtype = product_dtype(x)
    fitting = x.device.type == "cpu" or dtype == torch.bfloat16
    return hasattr(torch, "_grouped_mm") and fitting and in_features * dtype.itemsize % ALIGNED == 0


def linear(
    x: Tensor, slabs: Callable[[Tensor], Slabs], weight: PackedInt, bias: Tensor | None, routing: Routing
) -> Tensor:
    """x [S, in] by stacked weights → [routing.rows(x), out] in x's dtype.

    slabs: of offsets int32 [E], the values of some rows of all experts [E, rows, in] in turn, in `product_dtype(x)`;
    of experts without rows they may be anything.
    """
    if routing.chosen is not None:
        order, ends = sort(routing.chosen, len(weight.packed))
        found = linear(x[order // routing.choices], slabs, weight, bias, Routing(ends))
        return torch.empty_like(found).index_copy_(0, order, found)
    assert routing.offs is not None
    offs = routing.offs
    wide = x.to(product_dtype(x))
    y = wide.new_empty(len(x), weight.out_features)
    for rows, values in slabs(offs):
        y[:, rows] = torch._grouped_mm(wide, values.transpose(1, 2), offs=offs)
    row = torch.arange(len(x), device=x.device, dtype=offs.dtype)
    if bias is not None:
        expert = torch.searchsorted(offs, row, right=True, out_int32=True).clamp_(max=len(offs) - 1)
        y += bias.to(y.dtype)[expert]
    # What torch leaves in rows of no expert may be NaN.
    return y.masked_fill_((row >= offs[-1]).unsqueeze(1), 0).to(x.dtype)


def gradient(grad: Tensor, slabs: Callable[[Tensor], Slabs], weight: PackedInt, routing: Routing) -> Tensor:
    """The gradient with respect to x of `linear`: each row of grad [S, out] by its expert's W, summed over a row's
    choices.

    slabs: as for `linear`, each of a multiple of ALIGNED bytes of outputs. Sums of slabs are float32.
    """
    if routing.chosen is not None:
        order, ends = sort(routing.chosen, len(weight.packed))
        found = gradient(grad[order], slabs, weight, Routing(ends))
        found = torch.empty_like(found).index_copy_(0, order, found)
        choices = routing.choices
        return found if choices == 1 else found.view(-1, choices, weight.in_features).sum(1)
    assert routing.offs is not None
    if not len(grad):
        return grad.new_zeros(0, weight.in_features)
    offs, wide = routing.offs, grad.to(product_dtype(grad))
    total = grad.new_zeros(len(grad), weight.in_features, dtype=torch.float32)
    for rows, values in slabs(offs):
        # A copy, as strides of one row or none are otherwise whatever they were.
        part = wide[:, rows].clone(memory_format=torch.contiguous_format)
        total += torch._grouped_mm(part, values, offs=offs)
    row = torch.arange(len(grad), device=grad.device, dtype=offs.dtype)
    return total.masked_fill_((row >= offs[-1]).unsqueeze(1), 0).to(grad.dtype)
