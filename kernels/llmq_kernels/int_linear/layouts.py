"""Layouts: how an integer weight is packed for the operator that reads it; chosen once, at load.

A layout is a module of this package with `refusal`, `pack`, `nbytes`, `linear` and `dequantize`:

- planes: for the Triton kernels, on a GPU;
- int4pack: for torch's int4 operator, on a CPU;
- int8pack: for torch's int8 operator, on a CPU;
- dense_bits: the plain form itself, on any device.
"""

from __future__ import annotations

import functools
import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from llmq_kernels.checks import check_device
from llmq_kernels.int_linear.dense_bits import check_plain
from llmq_kernels.weights import PackedInt

DENSE_BITS = "dense_bits"
"""The name of the plain form's layout."""
NAMES = ("planes", "int4pack", "int8pack", DENSE_BITS)


class Layout(Protocol):
    """The functions of a layout."""

    def refusal(
        self, device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
    ) -> str | None:
        """Why it does not support such a weight with inputs of that dtype, in a few words, or None."""

    def pack(self, plain: PackedInt, dtype: torch.dtype) -> PackedInt:
        """Convert the plain form to the layout, on the same device, for inputs of `dtype`."""

    def nbytes(
        self, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int, zeros: bool
    ) -> int:
        """The bytes of what `pack` returns for a weight with scales in `dtype`. zeros: whether it has zero points."""

    def linear(self, x: Tensor, weight: PackedInt, bias: Tensor | None) -> Tensor:
        """x [M, in], contiguous, M ≥ 1 → x · Wᵀ + bias [M, out] in x's dtype, summed in float32."""

    def dequantize(self, weight: PackedInt, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""


def layout(name: str) -> Layout:
    """The layout of that name. Raises ValueError if there is none."""
    if name not in NAMES:
        raise ValueError(f"the layouts of integer weights are {', '.join(NAMES)}, not {name!r}")
    return _module(name)


@functools.cache
def _module(name: str) -> Layout:
    return cast(Layout, importlib.import_module(f"llmq_kernels.int_linear.{name}"))


def choose(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> tuple[str, dict[str, str]]:
    """The fastest layout that supports a weight [out, in], and why faster ones do not: name → reason."""
    reasons: dict[str, str] = {}
    for name in NAMES:
        if name == "planes" and device.type == "cpu":
            continue  # Triton's interpreter is for tests only
        reason = layout(name).refusal(device, dtype, bits, out_features, in_features, group_size)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise AssertionError("the plain form supports everything")


def pack(
    name: str,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pack the plain form of a weight in a layout, for inputs of `dtype`.

    words: int32 [out, ceil(in·bits/32)]; scale: float [out, ceil(in/group_size)]; zero: int8 like scale, or None.
    Returns the codes, scale and zero that `torch.ops.llmq.int_linear` takes with that layout. Raises TypeError or
    ValueError if codes, scales and zero points do not fit together, or the layout does not support them.
    """
    if words.dim() != 2:
        raise ValueError(f"words must be [out, words per row], not {[*words.shape]}")
    plain = PackedInt(words, scale, zero, bits, words.shape[0], in_features, group_size)
    check_plain(plain)
    check_device(words, scale, "scale")
    chosen = layout(name)
    reason = chosen.refusal(words.device, dtype, bits, words.shape[0], in_features, group_size)
    if reason is not None:
        raise ValueError(f"layout {name}: {reason}")
    return chosen.pack(plain, dtype).tensors
