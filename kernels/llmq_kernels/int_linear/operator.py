"""Integer weights, in one of several layouts (`layouts`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.checks import check_device, check_input
from llmq_kernels.common import bias_grad, by_rows, linear_fake, refuse_weight_gradient
from llmq_kernels.int_linear import layouts, planes
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.weights import PackedInt

_WEIGHT = (
    "Tensor packed, Tensor scale, Tensor? zero{bias}, int bits, int out_features, int in_features, int group_size, "
    "str layout"
)
torch.library.define("llmq::int_linear", f"(Tensor x, {_WEIGHT.format(bias=', Tensor? bias')}) -> Tensor")
torch.library.define("llmq::int_linear_grad", f"(Tensor grad, {_WEIGHT.format(bias='')}) -> Tensor")


def int_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """x · Wᵀ + bias for an integer weight W [out, in] as `layouts.pack` returns it.

    x: float32, bfloat16 or float16 [..., in]; bias: [out]. Returns [..., out] in x's dtype. Raises TypeError or
    ValueError if x, bias or the device does not fit the weight.
    """
    weight = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size)
    if layout == "planes":
        return planes_linear(x, weight, bias)
    return by_rows(x, weight, bias, layouts.layout(layout).linear)


def planes_linear(x: Tensor, weight: PackedInt, bias: Tensor | None) -> Tensor:
    """`int_linear` in the layout "planes", whose kernels need no reshaping of x [..., in]; no operator, no gradient."""
    check_input(x, weight.out_features, weight.in_features, bias)
    check_device(x, weight.packed, "the weight")
    check_device(x, weight.scale, "scale")
    return planes.linear(x.contiguous(), weight, bias)


def int_linear_grad(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """The gradient with respect to x of `int_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size)
    return matmul(grad, layouts.layout(layout).dequantize(weight, product_dtype(grad)))


def _fake(x: Tensor, *weight: Any) -> Tensor:
    _, _, _, bias, _, out_features, in_features, _, _ = weight
    return linear_fake(x, out_features, in_features, bias)


def _grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    _, _, _, _, _, in_features, _, _ = weight
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero, bias, *rest = inputs
    refuse_weight_gradient(scale=scale)
    ctx.save_for_backward(packed, scale, zero)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.int_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return (x_grad, None, None, None, bias_grad(ctx, grad, 4), *(None for _ in ctx.rest))


torch.library.impl("llmq::int_linear", "default", int_linear)
torch.library.impl("llmq::int_linear_grad", "default", int_linear_grad)
torch.library.register_fake("llmq::int_linear", _fake)
torch.library.register_fake("llmq::int_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::int_linear", _backward, setup_context=_setup)
