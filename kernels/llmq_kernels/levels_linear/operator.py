"""4-bit codes with a codebook for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.common import bias_grad, by_rows, linear_fake, refuse_weight_gradient
from llmq_kernels.levels_linear import cpu
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.weights import PackedLevels

torch.library.define(
    "llmq::levels_linear",
    "(Tensor x, Tensor packed, Tensor levels, Tensor? bias, int out_features, int in_features) -> Tensor",
)
torch.library.define(
    "llmq::levels_linear_grad",
    "(Tensor grad, Tensor packed, Tensor levels, int out_features, int in_features) -> Tensor",
)


def levels_linear(
    x: Tensor, packed: Tensor, levels: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of 4-bit codes with a codebook for each row: `weights.PackedLevels`.

    Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    weight = PackedLevels(packed, levels, out_features, in_features)
    weight.check()
    return by_rows(x, weight, bias, cpu.linear)


def levels_linear_grad(grad: Tensor, packed: Tensor, levels: Tensor, out_features: int, in_features: int) -> Tensor:
    """The gradient with respect to x of `levels_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedLevels(packed, levels, out_features, in_features)
    return matmul(grad, cpu.dequantize(weight, product_dtype(grad)))


def _fake(
    x: Tensor, packed: Tensor, levels: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    return linear_fake(x, out_features, in_features, bias)


def _grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, levels, bias, *rest = inputs
    refuse_weight_gradient(levels=levels)
    ctx.save_for_backward(packed, levels)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.levels_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return x_grad, None, None, bias_grad(ctx, grad, 3), None, None


torch.library.impl("llmq::levels_linear", "default", levels_linear)
torch.library.impl("llmq::levels_linear_grad", "default", levels_linear_grad)
torch.library.register_fake("llmq::levels_linear", _fake)
torch.library.register_fake("llmq::levels_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::levels_linear", _backward, setup_context=_setup)
