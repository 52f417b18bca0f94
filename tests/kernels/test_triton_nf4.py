"""NF4 in Triton, in its interpreter where there is no GPU: the weight is bitsandbytes' own, products are float64's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from llmq_kernels.triton import nf4  # noqa: E402  (triton is imported here)
from llmq_kernels.triton.gpu import gpu_of  # noqa: E402
from llmq_kernels.weights import PackedCodebook  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (1, 2, 3, 4, 7, 16, 17, 33, 130)
# Whole blocks and words, a row of half blocks, K that only 8 divides and blocks that straddle rows, K that is odd.
SHAPES = ((33, 256), (9, 96), (6, 1032), (17, 77))


def draw(out: int, width: int, nested: bool, block: int = 64) -> tuple[tuple[Any, ...], Tensor]:
    """A weight of random codes and magnitudes of both signs, and what it is in float64, computed code by code."""
    generator = torch.Generator().manual_seed(out * width)
    size = out * width
    codes = torch.randint(0, 16, (size + size % 2,), generator=generator)
    packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
    codebook = torch.randn(16, generator=generator)
    blocks = -(-size // block)
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        share = torch.rand(-(-blocks // 256), generator=generator)
        levels, offset = torch.randn(256, generator=generator), 0.3
        magnitude = levels.double()[absmax.long()] * share.double()[torch.arange(blocks) // 256] + offset
        weight = (packed, absmax, codebook, share, levels, offset)
    else:
        absmax = torch.randn(blocks, generator=generator)
        magnitude = absmax.double()
        weight = (packed, absmax, codebook, None, None, 0.0)
    dense = codebook.double()[codes[:size]] * magnitude[torch.arange(size) // block]
    return weight, dense.view(out, width)


def moved(weight: tuple[Any, ...], *sizes: int) -> PackedCodebook:
    """With out, in and the block's size, on the device."""
    return PackedCodebook(*(part.to(DEVICE) if isinstance(part, Tensor) else part for part in weight), *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_float64_weight(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    out, width = shape
    weight, dense = draw(out, width, nested)
    for rows in ROWS:
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        bias = torch.randn(out).to(dtype) if rows % 2 else None
        y = nf4.linear(x.to(DEVICE), moved(weight, out, width, 64), None if bias is None else bias.to(DEVICE)).cpu()
        exact = x.double() @ dense.t() + (0 if bias is None else bias.double())
        # W and y are rounded once each, at most: half a unit of every product, and of the sum.
        allowed = torch.finfo(dtype).eps / 2 * (x.double().abs() @ dense.abs().t() + exact.abs()) * 1.01 + 1e-6
        assert y.dtype == dtype and y.shape == (rows, out)
        assert ((y.double() - exact).abs() <= allowed).all(), (rows, (y.double() - exact).abs().max())


@pytest.mark.parametrize("block", [32, 256, 4096])
def test_other_blocks(block: int) -> None:
    weight, dense = draw(9, 4096, True, block)
    for rows in (1, 5):
        x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(rows)).to(torch.float16)
        y = nf4.linear(x.to(DEVICE), moved(weight, 9, 4096, block), None).cpu()
        exact = x.double() @ dense.t()
        assert torch.allclose(y.double(), exact, rtol=2e-3, atol=0.05)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 256), (33, 64), (2, 4096)])
def test_dequantizes_bit_for_bit_as_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=nested)
    inner = (state.state2.absmax, state.state2.code, float(state.offset)) if nested else (None, None, 0.0)
    weight = (packed.view(-1), state.absmax, state.code, *inner)
    made = nf4.dequantize(moved(weight, *shape, 64), dtype)
    assert torch.equal(made.cpu(), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(3, 7), (17, 77), (1, 1)])
def test_dequantizes_odd_shapes(shape: tuple[int, int]) -> None:
    weight, dense = draw(*shape, True)
    made = nf4.dequantize(moved(weight, *shape, 64), torch.float32).cpu()
    assert torch.allclose(made.double(), dense, rtol=1e-5, atol=1e-6)


def test_small_weights_are_split_along_k() -> None:
    """Where a weight has fewer tiles than the GPU multiprocessors, the parts add up to the same."""
    weight, dense = draw(8, 2048, False)
    x = torch.randn(7, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    bias = torch.randn(8).to(torch.bfloat16)
    assert nf4.choose(gpu_of(torch.device(DEVICE)), 7, 8, 2048).programs_k > 1
    y = nf4.linear(x.to(DEVICE), moved(weight, 8, 2048, 64), bias.to(DEVICE)).cpu()
    exact = x.double() @ dense.t() + bias.double()
    assert torch.allclose(y.double(), exact, rtol=0.02, atol=0.5)


def test_refuses_blocks_that_are_no_power_of_two() -> None:
    weight, _ = draw(4, 96, False)
    with pytest.raises(ValueError, match="32, 64, 128 … values, not 48"):
        nf4.linear(torch.zeros(1, 96, dtype=torch.float16), PackedCodebook(*weight, 4, 96, 48), None)
