"""Arithmetic in which Triton's interpreter differs from a GPU; shared by all kernels.

BACKEND: as `gpu.Gpu.backend`.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr, BACKEND: tl.constexpr):
    """float32 rounded to dtype, to nearest, half to even. The interpreter's own cast to bfloat16 truncates instead."""
    if BACKEND == "cpu" and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def product(a, b, total, BACKEND: tl.constexpr):
    """total + a · b on tensor cores. The interpreter would treat bfloat16 operands as integers, so it gets float32."""
    if BACKEND == "cpu":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def scaled(codes, s, BACKEND: tl.constexpr):
    """codes · s, rounded to codes' dtype."""
    if BACKEND == "cpu":
        found = rounded(codes.to(tl.float32) * s.to(tl.float32), codes.dtype, BACKEND)
    else:
        found = codes * s
    return found
