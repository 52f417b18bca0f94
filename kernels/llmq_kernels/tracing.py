"""The operators' schemas, their fake implementations for torch.compile (shapes only), and their input gradients.

Weights, scales and zero points are frozen: requesting their gradient is an error, not a silent None. The bias, which is
not quantized, gets a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.checks import check_input

_INT = (
    "Tensor packed, Tensor scale, Tensor? zero{bias}, int bits, int out_features, int in_features, int group_size, "
    "str layout"
)
_NF4 = (
    "Tensor packed, Tensor absmax, Tensor codebook, Tensor? nested_absmax, Tensor? nested_codebook, "
    "float offset{bias}, int out_features, int in_features, int block_size"
)
_BIAS = ", Tensor? bias"

torch.library.define("llmq::int_linear", f"(Tensor x, {_INT.format(bias=_BIAS)}) -> Tensor")
torch.library.define("llmq::int_linear_grad", f"(Tensor grad, {_INT.format(bias='')}) -> Tensor")
_CODEBOOK = (
    "Tensor packed, Tensor scale, Tensor codebook, Tensor tables{bias}, int out_features, int in_features, "
    "int group_size"
)
torch.library.define("llmq::codebook_linear", f"(Tensor x, {_CODEBOOK.format(bias=_BIAS)}) -> Tensor")
torch.library.define("llmq::codebook_linear_grad", f"(Tensor grad, {_CODEBOOK.format(bias='')}) -> Tensor")
torch.library.define("llmq::nf4_linear", f"(Tensor x, {_NF4.format(bias=_BIAS)}) -> Tensor")
torch.library.define("llmq::nf4_linear_grad", f"(Tensor grad, {_NF4.format(bias='')}) -> Tensor")
torch.library.define(
    "llmq::int8_linear", "(Tensor x, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias) -> Tensor"
)
torch.library.define("llmq::int8_linear_grad", "(Tensor grad, Tensor weight, Tensor scale) -> Tensor")
torch.library.define(
    "llmq::levels_linear",
    "(Tensor x, Tensor packed, Tensor levels, Tensor? bias, int out_features, int in_features) -> Tensor",
)
torch.library.define(
    "llmq::levels_linear_grad",
    "(Tensor grad, Tensor packed, Tensor levels, int out_features, int in_features) -> Tensor",
)

torch.library.define(
    "llmq::vectors_linear",
    "(Tensor x, Tensor packed, Tensor table, Tensor scale, Tensor? bias, int out_features, int in_features) -> Tensor",
)
torch.library.define(
    "llmq::vectors_linear_grad",
    "(Tensor grad, Tensor packed, Tensor table, Tensor scale, int out_features, int in_features) -> Tensor",
)


def _int_linear_fake(x: Tensor, *weight: Any) -> Tensor:
    _, _, _, bias, _, out_features, in_features, _, _ = weight
    return _linear_fake(x, out_features, in_features, bias)


def _int_linear_grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    _, _, _, _, _, in_features, _, _ = weight
    return grad.new_empty(*grad.shape[:-1], in_features)


def _codebook_linear_fake(x: Tensor, *weight: Any) -> Tensor:
    *_, bias, out_features, in_features, _ = weight
    return _linear_fake(x, out_features, in_features, bias)


def _codebook_linear_grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    *_, in_features, _ = weight
    return grad.new_empty(*grad.shape[:-1], in_features)


def _nf4_linear_fake(x: Tensor, *weight: Any) -> Tensor:
    *_, bias, out_features, in_features, _ = weight
    return _linear_fake(x, out_features, in_features, bias)


def _nf4_linear_grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    *_, in_features, _ = weight
    return grad.new_empty(*grad.shape[:-1], in_features)


def _int8_linear_fake(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    return _linear_fake(x, weight.shape[0], weight.shape[1], bias)


def _int8_linear_grad_fake(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _levels_linear_fake(
    x: Tensor, packed: Tensor, levels: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    return _linear_fake(x, out_features, in_features, bias)


def _levels_linear_grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight[-1])


def _vectors_linear_fake(x: Tensor, *weight: Any) -> Tensor:
    *_, bias, out_features, in_features = weight
    return _linear_fake(x, out_features, in_features, bias)


def _vectors_linear_grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight[-1])


def _linear_fake(x: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> Tensor:
    check_input(x, out_features, in_features, bias)
    return x.new_empty(*x.shape[:-1], out_features)


def _int_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero, bias, *rest = inputs
    refuse_weight_gradient(scale=scale)
    ctx.save_for_backward(packed, scale, zero)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _int_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.int_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return (x_grad, None, None, None, _bias_grad(ctx, grad, 4), *(None for _ in ctx.rest))


def _codebook_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, codebook, tables, bias, *rest = inputs
    refuse_weight_gradient(scale=scale, codebook=codebook)
    ctx.save_for_backward(packed, scale, codebook, tables)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _codebook_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    x_grad = torch.ops.llmq.codebook_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if needed else None
    return (x_grad, *(None,) * 4, _bias_grad(ctx, grad, 5), None, None, None)


def _nf4_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, codebook, nested_absmax, nested_codebook, offset, bias, *rest = inputs
    refuse_weight_gradient(absmax=absmax, codebook=codebook)
    ctx.save_for_backward(packed, absmax, codebook, nested_absmax, nested_codebook)
    ctx.rest, ctx.bias_dtype = (offset, *rest), None if bias is None else bias.dtype


def _nf4_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.nf4_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return (x_grad, *(None,) * 6, _bias_grad(ctx, grad, 7), None, None, None)


def _int8_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, _, bias = inputs
    refuse_weight_gradient(scale=scale)
    ctx.save_for_backward(weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _int8_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.int8_linear_grad(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return x_grad, None, None, None, _bias_grad(ctx, grad, 4)


def _levels_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, levels, bias, *rest = inputs
    refuse_weight_gradient(levels=levels)
    ctx.save_for_backward(packed, levels)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _levels_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.levels_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return x_grad, None, None, _bias_grad(ctx, grad, 3), None, None


def _vectors_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, table, scale, bias, *rest = inputs
    refuse_weight_gradient(table=table, scale=scale)
    ctx.save_for_backward(packed, table, scale)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _vectors_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = (
        torch.ops.llmq.vectors_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    )
    return x_grad, None, None, None, _bias_grad(ctx, grad, 4), None, None


def _bias_grad(ctx: Any, grad: Tensor, at: int) -> Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[at]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def refuse_weight_gradient(**tensors: Tensor) -> None:
    """Raises NotImplementedError, by their names, for tensors of a weight that want a gradient."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise NotImplementedError(f"{name} of a low-bit weight is frozen: train an adapter on top of it instead")


torch.library.register_autograd("llmq::int_linear", _int_linear_backward, setup_context=_int_linear_setup)
torch.library.register_autograd(
    "llmq::codebook_linear", _codebook_linear_backward, setup_context=_codebook_linear_setup
)
torch.library.register_fake("llmq::codebook_linear", _codebook_linear_fake)
torch.library.register_fake("llmq::codebook_linear_grad", _codebook_linear_grad_fake)
torch.library.register_autograd("llmq::nf4_linear", _nf4_linear_backward, setup_context=_nf4_linear_setup)
torch.library.register_autograd("llmq::int8_linear", _int8_linear_backward, setup_context=_int8_linear_setup)
torch.library.register_autograd("llmq::levels_linear", _levels_linear_backward, setup_context=_levels_linear_setup)
torch.library.register_fake("llmq::levels_linear", _levels_linear_fake)
torch.library.register_fake("llmq::levels_linear_grad", _levels_linear_grad_fake)
torch.library.register_autograd("llmq::vectors_linear", _vectors_linear_backward, setup_context=_vectors_linear_setup)
torch.library.register_fake("llmq::vectors_linear", _vectors_linear_fake)
torch.library.register_fake("llmq::vectors_linear_grad", _vectors_linear_grad_fake)
torch.library.register_fake("llmq::int_linear", _int_linear_fake)
torch.library.register_fake("llmq::int_linear_grad", _int_linear_grad_fake)
torch.library.register_fake("llmq::nf4_linear", _nf4_linear_fake)
torch.library.register_fake("llmq::nf4_linear_grad", _nf4_linear_grad_fake)
torch.library.register_fake("llmq::int8_linear", _int8_linear_fake)
torch.library.register_fake("llmq::int8_linear_grad", _int8_linear_grad_fake)
