"""What the kernels have to know of the machine they run on: NVIDIA ("cuda"), AMD ("hip") or the interpreter ("cpu")."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl

# Each TARGET that is compiled for, and the GPUs that scripts/compile_kernels.py compiles it for.
COMPILED = {"cuda": ("cuda:80", "cuda:89", "cuda:90", "cuda:100"), "hip": ("hip:gfx942",)}
# What a launch reckons with in the interpreter: few enough that small tests split K, too.
INTERPRETED_PROCESSORS = 8


def target(device: torch.device) -> str:
    """The constexpr TARGET of the kernels. ROCm's torch calls its devices cuda too."""
    if device.type != "cuda":
        return "cpu"
    return "cuda" if torch.version.hip is None else "hip"


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@triton.jit
def rounded(value, dtype: tl.constexpr, TARGET: tl.constexpr):
    """float32 rounded to dtype, to nearest, half to even. The interpreter's own cast to bfloat16 cuts off instead."""
    if TARGET == "cpu" and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def product(a, b, total, TARGET: tl.constexpr):
    """total + a · b on tensor cores. The interpreter takes bfloat16 operands for integers: it gets them as float32."""
    if TARGET == "cpu":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)
