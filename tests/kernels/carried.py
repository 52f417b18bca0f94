"""A kernel that must not be: its sum goes from one tile's product into the next, and no scale is between them.

Triton 3.6 then unpacks a tile into registers that products in flight still read. The check of the machine code is
tested on it. Run as a script it compiles the kernel for Hopper and prints how many instructions do that.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "scripts")]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from llmq_kernels.triton.launch import Launch  # noqa: E402
from llmq_kernels.triton.unpack import half_codes, side_by_side  # noqa: E402


@triton.jit
def carried(x, packed, y, K, tiles, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SCALED: tl.constexpr):
    """y [BLOCK_N, BLOCK_M] = codes · x; with SCALED, each tile's product is multiplied before it is added."""
    n, m, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, 32)
    k = tl.arange(0, 128)
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    one = tl.where(K > 0, 1.0, 0.0)
    for tile in range(tiles):
        w = tl.load(packed + n[:, None] * (tiles * 32) + tile * 32 + t[None, :])
        xs = tl.load(x + m[None, :] * K + tile * 128 + k[:, None])
        parts = ()
        for j in tl.static_range(4):
            parts = parts + (half_codes(w, None, 4, j * 4, tl.bfloat16, "cuda"),)
        run = tl.dot(side_by_side(parts, 4), xs)
        total += run * one if SCALED else run
    tl.store(y + n[:, None] * BLOCK_M + m[None, :], total)


def overwritten(scaled: bool) -> int:
    """How many of its instructions write registers of a product in flight."""
    import compile_kernels

    from llmq_kernels.triton.compile import compile_launch

    def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors = meta(torch.bfloat16, 128, 8192), meta(torch.int16, 128, 2048), meta(torch.float32, 128, 128)
    constexprs = {"BLOCK_N": 128, "BLOCK_M": 128, "SCALED": scaled}
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    made = Launch(carried, (1, 1, 1), (*tensors, 8192, 64), constexprs, options)
    return compile_kernels.nvidia(compile_launch(made, "cuda:90").asm["cubin"])["overwritten"]


if __name__ == "__main__":
    print(overwritten(False), overwritten(True))
