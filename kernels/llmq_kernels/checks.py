"""Checks of the operators' arguments; errors say what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmq_kernels.grouped_int_linear.route import Routing
    from llmq_kernels.weights import PackedInt

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_input(x: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> None:
    """Check x and bias of any operator. Raises TypeError for a wrong dtype, ValueError for a wrong shape or device."""
    if x.dtype not in FLOATS:
        raise TypeError(f"the input must be float32, bfloat16 or float16, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"the weight [{out_features}, {in_features}] takes inputs [..., {in_features}], not {[*x.shape]}"
        )
    if bias is not None:
        check("bias", bias, FLOATS, (out_features,))
        check_device(x, bias, "bias")


def check_routed(x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing) -> None:
    """Check the input of a product with stacked weights as `check_input` does, biases [E, out] and the routing."""
    check_input(x, weight.out_features, weight.in_features, None)
    if x.dim() != 2:
        raise ValueError(f"a grouped product takes rows [S, {weight.in_features}], not {[*x.shape]}")
    if weight.packed.dim() < 3:
        raise ValueError(f"stacked weights are [E, …] with an axis for experts, not {[*weight.packed.shape]}")
    if (weight.codebook is None) != (weight.tables is None):
        raise ValueError("a codebook and its tables are given together, or neither")
    experts, offs, chosen = weight.packed.shape[0], routing.offs, routing.chosen
    if (offs is None) == (chosen is None):
        raise ValueError("give offs of sorted rows, or chosen experts, and not both")
    if offs is not None:
        check("offs", offs, torch.int32, (experts,))
        check_device(x, offs, "offs")
    if chosen is not None:
        check("chosen", chosen, (torch.int32, torch.int64), (x.shape[0], chosen.shape[-1] if chosen.dim() else 1))
        check_device(x, chosen, "chosen")
    if bias is not None:
        check("bias", bias, FLOATS, (experts, weight.out_features))
        check_device(x, bias, "bias")


def check(name: str, tensor: Tensor, dtypes: torch.dtype | Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """Raises TypeError or ValueError unless the tensor has one of the dtypes and the shape."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(map(str, allowed))}, not {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {[*shape]}, not {[*tensor.shape]}")


def check_device(x: Tensor, tensor: Tensor, name: str) -> None:
    """Raises ValueError unless both are on the same device."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, the input on {x.device}: move the model or the input")


def check_sizes(bits: int, group_size: int) -> None:
    """Raises ValueError unless the operators support these bits and this group size."""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"there are operators for 2, 3, 4 and 8 bits, not {bits}")
    if group_size < 1:
        raise ValueError(f"a group has at least one input, not {group_size}")
