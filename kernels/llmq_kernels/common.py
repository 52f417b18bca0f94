"""What the operators share: checks of the input, shapes for torch.compile, and gradients.

Weights, scales and zero points are frozen: requesting their gradient is an error, not a silent None. The bias, which is
not quantized, gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from llmq_kernels.checks import check_device, check_input
from llmq_kernels.weights import PackedCodebook, PackedFloat8, PackedInt, PackedInt8, PackedLevels, PackedVectors

Packed = TypeVar("Packed", PackedInt, PackedCodebook, PackedInt8, PackedFloat8, PackedLevels, PackedVectors)


def linear_fake(x: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> Tensor:
    """A product's shape [..., out] and dtype, for torch.compile and CUDA graphs."""
    check_input(x, out_features, in_features, bias)
    return x.new_empty(*x.shape[:-1], out_features)


def bias_grad(ctx: Any, grad: Tensor, at: int) -> Tensor | None:
    """The gradient of the bias, the operator's argument number `at`, if it wants one."""
    if ctx.bias_dtype is None or not ctx.needs_input_grad[at]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def refuse_weight_gradient(**tensors: Tensor) -> None:
    """Raises NotImplementedError, by their names, for tensors of a weight that want a gradient."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise NotImplementedError(f"{name} of a low-bit weight is frozen: train an adapter on top of it instead")


def by_rows(
    x: Tensor, weight: Packed, bias: Tensor | None, linear: Callable[[Tensor, Packed, Tensor | None], Tensor]
) -> Tensor:
    """Check x [..., in], bias and device, and call a backend's product on x as contiguous rows."""
    out_features, in_features = weight.out_features, weight.in_features
    check_input(x, out_features, in_features, bias)
    check_device(x, weight.packed, "the weight")
    if isinstance(weight, PackedInt | PackedInt8 | PackedFloat8):
        check_device(x, weight.scale, "scale")
    rows = x.reshape(-1, in_features)
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    return linear(rows.contiguous(), weight, bias).view(*x.shape[:-1], out_features)
