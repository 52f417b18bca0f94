"""4-bit codes of one codebook with a magnitude for every block, as bitsandbytes stores them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.common import bias_grad, by_rows, linear_fake, refuse_weight_gradient
from llmq_kernels.nf4_linear import cpu, reference
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.weights import PackedCodebook

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor codebook, Tensor? nested_absmax, Tensor? nested_codebook, "
    "float offset{bias}, int out_features, int in_features, int block_size"
)
torch.library.define("llmq::nf4_linear", f"(Tensor x, {_WEIGHT.format(bias=', Tensor? bias')}) -> Tensor")
torch.library.define("llmq::nf4_linear_grad", f"(Tensor grad, {_WEIGHT.format(bias='')}) -> Tensor")


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of 4-bit codes into a codebook; the tensors: `weights.PackedCodebook`.

    Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    nested = nested_absmax, nested_codebook, offset
    weight = PackedCodebook(packed, absmax, codebook, *nested, out_features, in_features, block_size)
    weight.check()
    return by_rows(x, weight, bias, cpu.linear if x.device.type == "cpu" else _anywhere)


def nf4_linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    out_features: int,
    in_features: int,
    block_size: int,
) -> Tensor:
    """The gradient with respect to x of `nf4_linear`: grad [..., out] · W → [..., in]."""
    nested = nested_absmax, nested_codebook, offset
    weight = PackedCodebook(packed, absmax, codebook, *nested, out_features, in_features, block_size)
    dtype = product_dtype(grad)
    return matmul(grad, cpu.dequantize(weight, dtype))


def _anywhere(x: Tensor, weight: PackedCodebook, bias: Tensor | None) -> Tensor:
    nested = weight.nested_absmax, weight.nested_codebook, weight.offset
    return reference.nf4_linear(
        x, weight.packed, weight.absmax, weight.codebook, *nested, bias, weight.out_features, weight.block_size
    )


def _fake(x: Tensor, *weight: Any) -> Tensor:
    *_, bias, out_features, in_features, _ = weight
    return linear_fake(x, out_features, in_features, bias)


def _grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    *_, in_features, _ = weight
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, codebook, nested_absmax, nested_codebook, offset, bias, *rest = inputs
    refuse_weight_gradient(absmax=absmax, codebook=codebook)
    ctx.save_for_backward(packed, absmax, codebook, nested_absmax, nested_codebook)
    ctx.rest, ctx.bias_dtype = (offset, *rest), None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.nf4_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return (x_grad, *(None,) * 6, bias_grad(ctx, grad, 7), None, None, None)


torch.library.impl("llmq::nf4_linear", "default", nf4_linear)
torch.library.impl("llmq::nf4_linear_grad", "default", nf4_linear_grad)
torch.library.register_fake("llmq::nf4_linear", _fake)
torch.library.register_fake("llmq::nf4_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::nf4_linear", _backward, setup_context=_setup)
