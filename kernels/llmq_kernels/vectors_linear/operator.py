"""Bytes that select vectors of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.common import bias_grad, by_rows, linear_fake, refuse_weight_gradient
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.vectors_linear import cpu
from llmq_kernels.weights import PackedVectors

torch.library.define(
    "llmq::vectors_linear",
    "(Tensor x, Tensor packed, Tensor table, Tensor scale, Tensor? bias, int out_features, int in_features) -> Tensor",
)
torch.library.define(
    "llmq::vectors_linear_grad",
    "(Tensor grad, Tensor packed, Tensor table, Tensor scale, int out_features, int in_features) -> Tensor",
)


def vectors_linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of bytes that select vectors: `weights.PackedVectors`.

    Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    weight = PackedVectors(packed, table, scale, out_features, in_features)
    weight.check()
    return by_rows(x, weight, bias, cpu.linear)


def vectors_linear_grad(
    grad: Tensor, packed: Tensor, table: Tensor, scale: Tensor, out_features: int, in_features: int
) -> Tensor:
    """The gradient with respect to x of `vectors_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedVectors(packed, table, scale, out_features, in_features)
    return matmul(grad, cpu.dequantize(weight, product_dtype(grad)))


def _fake(x: Tensor, *weight: Any) -> Tensor:
    *_, bias, out_features, in_features = weight
    return linear_fake(x, out_features, in_features, bias)


def _grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, table, scale, bias, *rest = inputs
    refuse_weight_gradient(table=table, scale=scale)
    ctx.save_for_backward(packed, table, scale)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = (
        torch.ops.llmq.vectors_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    )
    return x_grad, None, None, None, bias_grad(ctx, grad, 4), None, None


torch.library.impl("llmq::vectors_linear", "default", vectors_linear)
torch.library.impl("llmq::vectors_linear_grad", "default", vectors_linear_grad)
torch.library.register_fake("llmq::vectors_linear", _fake)
torch.library.register_fake("llmq::vectors_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::vectors_linear", _backward, setup_context=_setup)
