"""Checks of the operators' arguments; errors say what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def check_grouped(
    x: Tensor, packed: Tensor, bias: Tensor | None, offs: Tensor, out_features: int, in_features: int
) -> None:
    """Check the input of a grouped product as `check_input` does, biases [E, out] and offsets int32 [E]."""
    check_input(x, out_features, in_features, None)
    if x.dim() != 2:
        raise ValueError(f"a grouped product takes rows [S, {in_features}], not {[*x.shape]}")
    check("offs", offs, torch.int32, (packed.shape[0],))
    check_device(x, offs, "offs")
    if bias is not None:
        check("bias", bias, FLOATS, (packed.shape[0], out_features))
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
