"""What all kernels share: arithmetic in which Triton's interpreter differs from a GPU, and how they follow each other.

BACKEND: as `gpu.Gpu.backend`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(PDL: tl.constexpr):
    """Programmatic dependent launch: let the next kernel's programs start, and wait for the kernel before this one.

    First in a kernel: memory that the kernel before has written, or may still read, is touched only after it.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


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
def whole(value):
    """The nearest whole numbers, half to even, of float32 below 2²² in magnitude.

    After adding 1.5 · 2²³ no fraction bits are left, so float32's own rounding rounds to an integer.
    """
    return (value + 12582912.0) - 12582912.0


@triton.jit
def product(a, b, total, BACKEND: tl.constexpr):
    """total + a · b on tensor cores. The interpreter would treat bfloat16 operands as integers, so it gets float32."""
    if BACKEND == "cpu":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def scaled(codes, s, BACKEND: tl.constexpr):
    """codes · s, rounded to codes' dtype; bfloat16 or float16, of one shape.

    On NVIDIA two neighbours at a time, as `unpack` makes them: the compiler would pair others, and move bytes to do so.
    """
    if BACKEND == "cpu":
        found = rounded(codes.to(tl.float32) * s.to(tl.float32), codes.dtype, BACKEND)
    elif BACKEND == "cuda":
        KIND: tl.constexpr = "f16x2" if codes.dtype == tl.float16 else "bf16x2"
        found = tl.inline_asm_elementwise(
            f"{{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.{KIND} $0, $1, $2, z; }}",
            "=r,r,r",
            [codes, s],
            dtype=codes.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        found = codes * s
    return found
