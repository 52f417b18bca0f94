"""The reference of grouped products in plain torch; each faster backend is tested against it."""

from __future__ import annotations

from torch import Tensor

from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int_linear.reference import int_linear


def grouped_int_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    routing: Routing,
    bits: int,
    group_size: int,
) -> Tensor:
    """`int_linear` by another weight for each row, as `routing` says, one row at a time.

    x: float [S, n]; words, scale, zero and bias: as in `int_linear`, stacked along a first axis [E, …]. Returns
    [routing.rows(x), out] in x's dtype.
    """
    y = x.new_zeros(routing.rows(x), words.shape[1])
    for row in range(len(y)):
        e = expert_of(routing, row)
        if 0 <= e < len(words):
            weight = words[e], scale[e], None if zero is None else zero[e], None if bias is None else bias[e]
            y[row] = int_linear(x[row // routing.choices], *weight, bits, group_size)
    return y


def expert_of(routing: Routing, row: int) -> int:
    """The expert of a row of the product; beyond the last offset the number of experts, which none has."""
    if routing.chosen is not None:
        return int(routing.chosen.reshape(-1)[row])
    assert routing.offs is not None
    return int((routing.offs <= row).sum())
