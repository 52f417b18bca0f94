"""The operator, its schema, fake and gradient with respect to the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.checks import check_device, check_routed
from llmq_kernels.common import refuse_weight_gradient
from llmq_kernels.grouped_int_linear import by_expert
from llmq_kernels.grouped_int_linear.route import Routing, sort, unsorted
from llmq_kernels.int_linear import layouts, planes
from llmq_kernels.weights import PackedInt

_WEIGHT = "Tensor packed, Tensor scale, Tensor? zero"
_REST = (
    "Tensor? offs, Tensor? chosen, int bits, int out_features, int in_features, int group_size, str layout, "
    "Tensor? codebook=None, Tensor? tables=None"
)
torch.library.define("llmq::grouped_int_linear", f"(Tensor x, {_WEIGHT}, Tensor? bias, {_REST}) -> Tensor")
torch.library.define("llmq::grouped_int_linear_grad", f"(Tensor grad, {_WEIGHT}, {_REST}) -> Tensor")


def grouped_int_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    offs: Tensor | None,
    chosen: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: str,
    codebook: Tensor | None = None,
    tables: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + bias for integer weights of E experts, each as in `int_linear`, stacked along a first axis.

    Either offs: int32 [E], where each expert's rows of x [S, in], sorted by expert, end; returns [S, out] in x's dtype.
    Or chosen: int32 or int64 [T, k], the experts of each row of x [T, in]; returns [T · k, out]. Rows beyond the last
    offset, and of experts that there are not, are zero. bias: float [E, out]. codebook, tables: as in `PackedInt`.

    Raises TypeError or ValueError if an argument does not fit; on a CPU also if offsets do not ascend to at most S. On
    a GPU nothing waits for them (but in float16 gradients and products of many rows), and offsets that do not ascend
    give wrong rows.
    """
    weight = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size, codebook, tables)
    return routed_linear(x, weight, bias, Routing(offs, chosen), layout)


def routed_linear(x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing, layout: str) -> Tensor:
    """The same without an operator, so without gradients."""
    check_routed(x, weight, bias, routing)
    check_device(x, weight.packed, "the weight")
    check_device(x, weight.scale, "scale")
    for name in ("zero", "codebook", "tables"):
        if (tensor := getattr(weight, name)) is not None:
            check_device(x, tensor, name)
    # Kernels read all of them as they lie in memory.
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    routing = routing.contiguous()
    if layout == "planes":
        if routing.chosen is None or unsorted(len(routing.chosen), routing.choices, len(weight.packed)):
            return planes.linear(x, weight, bias, routing)
        # One program for each pair would read an expert again and again, and a grid has room for 65,535.
        order, ends = sort(routing.chosen, len(weight.packed))
        found = planes.linear(x[order // routing.choices], weight, bias, Routing(ends))
        return torch.empty_like(found).index_copy_(0, order, found)
    return by_expert.linear(x, weight, bias, routing, layouts.layout(layout).linear)


def grouped_int_linear_grad(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offs: Tensor | None,
    chosen: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: str,
    codebook: Tensor | None = None,
    tables: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to x of `grouped_int_linear`: each row of grad by its expert's W, [S or T, in]."""
    weight = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size, codebook, tables)
    if layout == "planes":
        return planes.gradient(grad, weight, Routing(offs, chosen))
    return by_expert.gradient(grad, weight, Routing(offs, chosen), layouts.layout(layout).dequantize)


def _fake(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *rest: Any) -> Tensor:
    offs, chosen, bits, out_features, in_features, group_size, *_ = rest
    weight, routing = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size), Routing(offs, chosen)
    check_routed(x, weight, bias, routing)
    return x.new_empty(routing.rows(x), out_features)


def _grad_fake(grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> Tensor:
    _, chosen, _, _, in_features, *_ = rest
    return grad.new_empty(grad.shape[0] if chosen is None else chosen.shape[0], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero, bias, offs, chosen, *rest, codebook, tables = inputs
    refuse_weight_gradient(scale=scale)
    if bias is not None and bias.requires_grad:
        raise NotImplementedError("the biases of packed experts are frozen: train an adapter on top of them instead")
    ctx.save_for_backward(packed, scale, zero, offs, chosen, codebook, tables)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, zero, offs, chosen, codebook, tables = ctx.saved_tensors
    x_grad = None
    if ctx.needs_input_grad[0]:
        weight = packed, scale, zero, offs, chosen
        x_grad = torch.ops.llmq.grouped_int_linear_grad(grad, *weight, *ctx.rest, codebook, tables)
    return (x_grad, *(None,) * (8 + len(ctx.rest)))


torch.library.impl("llmq::grouped_int_linear", "default", grouped_int_linear)
torch.library.impl("llmq::grouped_int_linear_grad", "default", grouped_int_linear_grad)
torch.library.register_fake("llmq::grouped_int_linear", _fake)
torch.library.register_fake("llmq::grouped_int_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::grouped_int_linear", _backward, setup_context=_setup)
