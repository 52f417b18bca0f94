"""Unpacking, over every 16-bit word there is: the PTX and the plain way against shifts and masks by numpy.

On a CPU the PTX is run by `tests.kernels.ptx`, which also fails when a step rounds; on a GPU by the GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from llmq_kernels.codebook_linear.codebooks import tables_of
from llmq_kernels.triton.unpack import (
    half_codes,
    position,
    single_codes,
    sixteenth,
    slices,
    spread_tables,
    table_codes,
)
from tests.kernels import ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["cuda", "hip"]
SIZE = tl.constexpr(65536)


@pytest.fixture(autouse=True)
def assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", ptx.create_inline_asm)


@triton.jit
def halves(words, zeros, out, BITS: tl.constexpr, POS: tl.constexpr, BACKEND: tl.constexpr):
    at = tl.arange(0, SIZE)
    zero = None
    if zeros is not None:
        zero = tl.load(zeros + at)
    tl.store(out + at, half_codes(tl.load(words + at), zero, BITS, POS, out.dtype.element_ty, BACKEND))


@triton.jit
def singles(words, out, BITS: tl.constexpr, POS: tl.constexpr, BACKEND: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, single_codes(tl.load(words + at), BITS, POS, BACKEND))


@triton.jit
def sixteenths(first, second, third, out, BACKEND: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, sixteenth(tl.load(first + at), tl.load(second + at), tl.load(third + at), BACKEND))


def every_word(seed: int) -> np.ndarray:
    """All 16-bit words in some order, so that neighbours in a register differ."""
    return np.random.default_rng(seed).permutation(65536).astype(np.uint16)


def tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int16).copy()).to(DEVICE)


def places(bits: int) -> list[int]:
    return sorted({position.fn(bits, j) for j in range(slices.fn(bits))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_as_halves(bits: int, dtype: torch.dtype, backend: str) -> None:
    words, half = every_word(bits), 1 << (bits - 1)
    zeros = np.random.default_rng(1).integers(-half, half, 65536)
    out = torch.empty(65536, dtype=dtype, device=DEVICE)
    for place in places(bits):
        codes = (words >> place & (2 * half - 1)).astype(np.int64) - half
        halves[(1,)](tensor(words), None, out, bits, place, backend)
        assert (out.double().cpu().numpy() == codes).all()
        halves[(1,)](tensor(words), torch.from_numpy(zeros).float().to(DEVICE), out, bits, place, backend)
        assert (out.double().cpu().numpy() == codes - zeros).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_in_float32(bits: int, backend: str) -> None:
    words, half = every_word(bits), 1 << (bits - 1)
    out = torch.empty(65536, device=DEVICE)
    for place in places(bits):
        singles[(1,)](tensor(words), out, bits, place, backend)
        assert (out.cpu().numpy() == (words >> place & (2 * half - 1)).astype(np.int64) - half).all()


@triton.jit
def looked_up(words, tables, out, BACKEND: tl.constexpr):
    at = tl.arange(0, SIZE)
    t8 = spread_tables(tables, tl.zeros([SIZE], tl.int32), at >= 0, 1, False, [SIZE, 1])
    values = table_codes(tl.load(words + at)[:, None], t8, out.dtype.element_ty, BACKEND)
    for j in tl.static_range(4):
        tl.store(out + j * SIZE + at[:, None], values[j])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_a_codebook(dtype: torch.dtype, backend: str) -> None:
    words, codebook = every_word(4), torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    tables = tables_of(codebook)[[torch.bfloat16, torch.float16].index(dtype)]
    out = torch.empty(4, 65536, dtype=dtype, device=DEVICE)
    looked_up[(1,)](tensor(words), tables.to(DEVICE), out, backend)
    for j in range(4):
        codes = torch.from_numpy((words >> 4 * j & 15).astype(np.int64))
        assert torch.equal(out[j].cpu(), codebook[0].to(dtype)[codes])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sixteenth_code(backend: str) -> None:
    words = [every_word(seed) for seed in range(3)]
    out = torch.empty(65536, dtype=torch.int16, device=DEVICE)
    sixteenths[(1,)](*map(tensor, words), out, backend)
    expected = sum((word.astype(np.int64) >> 15) << place for place, word in enumerate(words))
    assert (out.cpu().numpy() & 7 == expected).all()
