"""NF4 against bitsandbytes itself: every stored bit, and every value read back."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids import nf4
from llmq.grids.nf4 import quantize_nf4
from llmq.grids.scheme import Scheme

F = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = F.get_4bit_type("nf4", device="cpu")


def scheme(double_quant: bool, size: int = 64) -> Scheme:
    return Scheme(4, size, grid="nf4", double_quant=double_quant)


def theirs(weight: Tensor, double_quant: bool, size: int = 64) -> tuple[Tensor, object]:
    made: tuple[Tensor, object] = F.quantize_4bit(
        weight, quant_type="nf4", blocksize=size, compress_statistics=double_quant
    )
    return made


def check(weight: Tensor, double_quant: bool, size: int = 64) -> None:
    """Ours is theirs, bit for bit: codes, magnitudes, and the values where their reader is right (see `dequantize`)."""
    packed, state = theirs(weight, double_quant, size)
    ours = quantize_nf4(weight, scheme(double_quant, size))
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    assert ours.absmax.dtype == state.absmax.dtype and torch.equal(ours.codebook, state.code)
    assert (ours.nested is None) == (not double_quant)
    if ours.nested is not None:
        assert torch.equal(ours.nested.absmax, state.state2.absmax) and ours.nested.offset == float(state.offset)
        assert torch.equal(ours.nested.codebook, state.state2.code)
    if weight.shape[1] % size == 0:
        for state.dtype in DTYPES:
            assert torch.equal(ours.dequantize(state.dtype), F.dequantize_4bit(packed, state))


def sample(seed: int) -> Tensor:
    """A random weight of a random shape, dtype and size, some of it zero or constant."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, width = rng.randint(1, 120), rng.choice([64, 128, 192, 512, 17, 33, 50, 96])
    weight = torch.randn(rows, width, generator=generator) * 10 ** rng.uniform(-4, 2)
    weight *= torch.exp(torch.randn(rows, 1, generator=generator) * rng.choice([0, 1, 2]))
    if rng.random() < 0.2:
        weight[:] = weight[0, 0].clone()
    if rng.random() < 0.3:
        weight[rows // 2 :] = 0
    return weight.clamp_(-6e4, 6e4).to(rng.choice(DTYPES))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_hundred_random_weights(double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "CHUNK", 1 << 12)
    for seed in range(100):
        check(sample(seed), double_quant)


@pytest.mark.parametrize(("size", "double_quant"), list(product([32, 128, 256], [False, True])))
def test_other_blocks(size: int, double_quant: bool) -> None:
    check(torch.randn(40, 2 * size, generator=torch.Generator().manual_seed(0)), double_quant, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_thresholds(dtype: torch.dtype) -> None:
    """Half-way between two levels, and a bit to either side, for magnitudes whose reciprocal is exact and not."""
    middle = (LEVELS[:-1] + LEVELS[1:]) / 2
    near = torch.cat([middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1), LEVELS])
    for size in (1.0, 2.0, 3.0, 0.7, 1e-5):
        weight = torch.zeros(4, 64)
        weight[:, 0] = 1
        weight[:, 1:] = torch.cat([near, near.flip(0), near, near, near])[: 4 * 63].view(4, 63)
        check((weight * size).to(dtype), False)


def test_thresholds_in_a_partial_block() -> None:
    """There a value is divided by the magnitude, elsewhere multiplied by its reciprocal: that can be another code."""
    middle = (LEVELS[:-1] + LEVELS[1:]) / 2
    near = torch.cat([torch.ones(1), middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)])
    for size in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        check((near * size).view(1, -1), False)


def test_the_lookup_of_the_magnitudes() -> None:
    """All the way around every step at which the 8-bit code changes: their table is not the nearest everywhere."""
    table = nf4._lookup(F.create_dynamic_map())
    change = (table[1:] != table[:-1]).nonzero()[:, 0] + 1
    edge = ((change.double() - 0.5) / nf4.STEPS * 2 - 1).float()
    values = torch.cat([edge + step * 2.0**-25 for step in range(-8, 9)]).clamp_(-1, 1)
    blocks = torch.ones(len(values), nf4.NESTED_BLOCK)
    blocks[:, 1] = values
    # Their mean is near 0, which that of a weight's magnitudes cannot be: so the inner function is called.
    blocks[:, 2] = -values
    blocks[:, 3:] = torch.tensor([-1.0, 1.0]).repeat(127)[:253]
    absmax = blocks.view(-1)
    offset = absmax.mean()
    codes, state = F.quantize_blockwise(absmax - offset, blocksize=nf4.NESTED_BLOCK)
    empty = torch.zeros(0, dtype=torch.uint8)
    ours = nf4._nest(nf4.NF4Weight(empty, absmax, LEVELS, (1, 1), torch.float32, scheme(True)))
    assert torch.equal(ours.absmax, codes) and ours.nested is not None
    assert torch.equal(ours.nested.absmax, state.absmax)
    assert torch.equal(ours.magnitudes(), F.dequantize_blockwise(codes, state) + offset)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", [1e36, 1e-30, 1e-38, 1e-40, 1e-44])
def test_huge_and_tiny_blocks(size: float, double_quant: bool) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(1)) * size
    packed, state = theirs(weight, double_quant)
    ours = quantize_nf4(weight, scheme(double_quant))
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dequantize(torch.float32), F.dequantize_4bit(packed, state))


def test_zeros_with_a_partial_block() -> None:
    for dtype, double_quant in product(DTYPES, [False, True]):
        check(torch.zeros(5, 50, dtype=dtype), double_quant)


def test_a_partial_block_is_read_back() -> None:
    """Their reader takes wrong magnitudes here, so the reference is the definition, in float64."""
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(2))
    ours = quantize_nf4(weight, scheme(False))
    flat = torch.nn.functional.pad(weight.view(-1).double(), (0, 64 - 7 * 48 % 64)).view(-1, 64)
    most = flat.abs().amax(1, keepdim=True)
    nearest = LEVELS.double()[(flat.unsqueeze(-1) / most.unsqueeze(-1) - LEVELS.double()).abs().argmin(-1)] * most
    want = nearest.view(-1)[: 7 * 48].view(7, 48)
    torch.testing.assert_close(ours.dequantize(torch.float32).double(), want, rtol=1e-6, atol=1e-7)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(101, 192, generator=torch.Generator().manual_seed(3))
    whole = quantize_nf4(weight, scheme(True), torch.bfloat16)
    monkeypatch.setattr(nf4, "CHUNK", 4096)
    parts = quantize_nf4(weight, scheme(True), torch.bfloat16)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.absmax, parts.absmax)
    monkeypatch.undo()
    assert torch.equal(whole.dequantize(torch.float32), parts.dequantize(torch.float32))
    assert whole.dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(LlmqError, match="not finite"):
        quantize_nf4(torch.tensor([[1.0, float("nan")]]), scheme(False))
    with pytest.raises(LlmqError, match="not finite"):
        quantize_nf4(torch.full((2, 64), float("inf")), scheme(True))
    with pytest.raises(LlmqError, match="in blocks \\(group size\\) of 32, 64"):
        quantize_nf4(torch.ones(2, 64), Scheme(4, 48, grid="nf4"))
    with pytest.raises(LlmqError, match="turn double_quant off"):
        quantize_nf4(torch.full((64, 64), 3e38), scheme(True))


@pytest.mark.slow
def test_importing_llmq_imports_no_bitsandbytes() -> None:
    code = "import sys, llmq.grids.nf4; sys.exit('bitsandbytes' in sys.modules)"
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=path).returncode == 0
