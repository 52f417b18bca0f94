"""One product for each expert that has rows, by what multiplies a single weight: on CPUs, and wherever else nothing
multiplies all at once. It reads on the host which experts these are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.weights import PackedInt

ROWS, FEW_ROWS = 16, 48
Rows = slice | Tensor
Linear = Callable[[Tensor, PackedInt, Tensor | None], Tensor]


def linear(x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing, one: Linear) -> Tensor:
    """x [S, in] by stacked weights → [routing.rows(x), out]. one: multiplies rows by one expert's.

    Raises ValueError unless offsets ascend to at most S.
    """
    y, choices = x.new_zeros(routing.rows(x), weight.out_features), routing.choices
    for expert, rows in rows_of(routing, x, len(weight.packed)):
        some = x[_of_x(rows, choices)]
        found = one(_whole(some), at(weight, expert), None if bias is None else bias[expert])
        y[rows] = found[: len(some)]
    return y


def gradient(
    grad: Tensor, weight: PackedInt, routing: Routing, dequantize: Callable[[PackedInt, torch.dtype], Tensor]
) -> Tensor:
    """The gradient with respect to x of `linear`: each row of grad by its expert's W, summed over a row's choices."""
    x_grad = grad.new_zeros(len(grad), weight.in_features)
    for expert, rows in rows_of(routing, grad, len(weight.packed)):
        x_grad[rows] = matmul(grad[rows], dequantize(at(weight, expert), product_dtype(grad)))
    return x_grad if routing.choices == 1 else x_grad.view(-1, routing.choices, weight.in_features).sum(1)


def at(weight: PackedInt, expert: int) -> PackedInt:
    """One expert's weight, of a stack."""
    packed, scale, zero = weight.tensors
    tensors = packed[expert], scale[expert], None if zero is None else zero[expert]
    sizes = weight.bits, weight.out_features, weight.in_features, weight.group_size
    if weight.codebook is None or weight.tables is None:
        return PackedInt(*tensors, *sizes)
    return PackedInt(*tensors, *sizes, weight.codebook[expert], weight.tables[expert])


def rows_of(routing: Routing, x: Tensor, experts: int) -> Iterator[tuple[int, Rows]]:
    """The experts that have rows of the product, and which. x: as the product's. Raises ValueError as `linear` does."""
    if routing.offs is not None:
        yield from _sections(routing.offs, len(x))
        return
    assert routing.chosen is not None
    mine: dict[int, list[int]] = {}
    for row, expert in enumerate(routing.chosen.reshape(-1).tolist()):
        if 0 <= expert < experts:
            mine.setdefault(expert, []).append(row)
    for expert, rows in mine.items():
        yield expert, slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.tensor(rows, device=x.device)


def _of_x(rows: Rows, choices: int) -> Rows:
    if choices == 1:
        return rows
    return slice(rows.start // choices, rows.start // choices + 1) if isinstance(rows, slice) else rows // choices


def _sections(offs: Tensor, count: int) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if not start <= end <= count:
            raise ValueError(f"offs must ascend from 0 to at most {count} rows, but {end} follows {start}")
        if end > start:
            yield expert, slice(start, end)
        start = end


def _whole(x: Tensor) -> Tensor:
    """On a CPU, many rows with zeros below them, up to a multiple of ROWS.

    oneDNN keeps what it compiles for each number of rows, about half a MiB for a product: of experts, up to 1024.
    """
    more = -len(x) % ROWS if x.device.type == "cpu" and len(x) > FEW_ROWS else 0
    return torch.nn.functional.pad(x, (0, 0, 0, more)) if more else x
