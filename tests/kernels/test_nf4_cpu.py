"""The CPU's NF4 against float64 on codes taken apart one by one, and its layout against bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.nf4_linear import cpu as nf4_cpu
from llmq_kernels.weights import PackedCodebook


def weight(out: int, n: int, block: int, nested: bool) -> tuple[PackedCodebook, Tensor]:
    """The stored tensors of a random weight, and the weight in float64."""
    generator = torch.Generator().manual_seed(out + n + block)
    codes = torch.randint(0, 16, (out * n,), generator=generator)
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    packed = (even[:, 0] * 16 + even[:, 1]).to(torch.uint8)
    codebook = torch.randn(16, generator=generator)
    blocks = -(-out * n // block)
    absmax: Tensor = torch.rand(blocks, generator=generator) + 0.1
    stored = PackedCodebook(packed, absmax, codebook, None, None, 0.0, out, n, block)
    exact = absmax.double()
    if nested:
        bytes_ = torch.randint(0, 256, (blocks,), generator=generator)
        shares, table = torch.rand(-(-blocks // 256), generator=generator) + 0.5, torch.randn(256, generator=generator)
        stored = PackedCodebook(packed, bytes_.to(torch.uint8), codebook, shares, table, 0.25, out, n, block)
        exact = table.double()[bytes_] * shares.double()[torch.arange(blocks) // 256] + 0.25
    dense = codebook.double()[codes] * exact[torch.arange(out * n) // block]
    return stored, dense.view(out, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("out", "n", "block"),
    [(64, 128, 64), (300, 96, 64), (7, 33, 64), (5, 7, 32), (130, 100, 128), (1, 1, 64), (9, 64, 4096)],
)
@pytest.mark.parametrize("slab", [64, 1 << 20])
def test_linear_and_dequantize_are_those_of_the_weight(
    out: int, n: int, block: int, nested: bool, dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_cpu, "SLAB", slab)
    monkeypatch.setattr(products, "slab_size", lambda x, width: slab)
    stored, exact = weight(out, n, block, nested)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(out, generator=generator).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    dense = nf4_cpu.dequantize(stored, dtype)
    assert dense.dtype == dtype
    assert (dense.double() - exact).norm() <= tolerance * exact.norm()
    for rows in (1, 3, 33):
        x = torch.randn(rows, n, generator=generator).to(dtype)
        got = nf4_cpu.linear(x, stored, bias)
        expected = x.double() @ exact.t() + bias.double()
        assert got.dtype == dtype and got.shape == (rows, out)
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_fours_are_as_good_as_pairs(size: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of any size, and many: each value is off by half a unit of bfloat16 and an eighth of that."""
    stored, exact = weight(96, 128, 64, True)
    stored, exact = replace(stored, codebook=stored.codebook * size), exact * size
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert nf4_cpu._has_fours(stored)
    got = torch.cat([slab.clone() for _, slab in nf4_cpu._slabs_of_fours(stored, 2000)])
    assert ((got.double() - exact).abs() <= 2.0**-8 * 1.13 * exact.abs()).all()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.double() @ exact.t()
    for slabs in (True, False):
        monkeypatch.setattr(nf4_cpu, "_has_fours", lambda stored, slabs=slabs: slabs)
        off = (nf4_cpu.linear(x, stored, None).double() - expected).norm() / expected.norm()
        assert off < 3e-3


def test_codes_that_do_not_lie_in_one_piece() -> None:
    stored, dense = weight(8, 128, 64, False)
    apart = torch.empty(2 * len(stored.packed), dtype=torch.uint8)[::2].copy_(stored.packed)
    x = torch.eye(128).bfloat16()
    got = nf4_cpu.linear(x, replace(stored, packed=apart), None)
    assert torch.equal(got, nf4_cpu.linear(x, stored, None)) or torch.allclose(got.double(), dense.t(), rtol=2**-7)


def test_the_layout_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state)
    stored = PackedCodebook(packed.view(-1), state.absmax, state.code, None, None, 0.0, 48, 128, 64)
    got = nf4_cpu.dequantize(stored, torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
