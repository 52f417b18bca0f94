"""K-quants' bytes, decoded value by value as ggml's C code does, and by the package gguf where it is installed."""

from __future__ import annotations

import struct

import pytest
import torch

from llmq.formats.gguf import blocks, kquants
from llmq.formats.gguf.types import TYPES
from llmq.grids.kquants import MULTIPLES, KWeight, Levels
from llmq.grids.scheme import Scheme

NAMES = [*blocks.K_QUANTS]
EVERY = pytest.mark.parametrize("name", NAMES)


def sample(scheme: Scheme, rows: int = 2, width: int = 512) -> KWeight:
    """Random codes and multiples, with the ends of both."""
    torch.manual_seed(scheme.bits)
    lowest, highest = (scheme.qmin, scheme.qmax) if scheme.symmetric else (0, 2**scheme.bits - 1)
    codes = torch.randint(lowest, highest + 1, (rows, width), dtype=torch.int8)
    codes[0, :2] = torch.tensor([lowest, highest])
    groups, limits = scheme.groups(width), MULTIPLES[scheme.bits]
    whole = torch.randint(limits[0], limits[1] + 1, (rows, groups)).to(torch.int8)
    whole[0, :2], whole[0, -2:] = torch.tensor(limits), torch.tensor(limits)
    d, e = (torch.randn(2, rows, width // 256) * 0.01).to(torch.float16).abs()
    if scheme.symmetric:
        return KWeight(codes, Levels(whole, -d), scheme)
    lows = torch.randint(0, limits[1] + 1, (rows, groups)).to(torch.int8)
    lows[0, :2], lows[0, -2:] = torch.tensor([0, limits[1]]), torch.tensor([limits[1], 0])
    return KWeight(codes, Levels(whole, d, lows, e), scheme)


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def six(data: bytes, j: int) -> tuple[int, int]:
    """ggml's get_scale_min_k4."""
    if j < 4:
        return data[j] & 63, data[j + 4] & 63
    return (data[j + 4] & 15) | (data[j - 4] >> 6) << 4, (data[j + 4] >> 4) | (data[j] >> 6) << 4


def decode(name: str, data: bytes) -> list[float]:
    """One block, in the order of ggml's loops."""
    found = []
    if name == "Q2_K":
        d, e = half(data[80:82]), half(data[82:84])
        for i in range(256):
            code = data[16 + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
            found.append(d * (data[i // 16] & 15) * code - e * (data[i // 16] >> 4))
    elif name == "Q3_K":
        low, d = data[96:108], half(data[108:110])
        for i in range(256):
            code = data[32 + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
            code -= 0 if data[i % 32] & 1 << i // 32 else 4
            j = i // 16
            scale = (low[j] & 15 if j < 8 else low[j - 8] >> 4) | (low[8 + j % 4] >> 2 * (j // 4) & 3) << 4
            found.append(d * (scale - 32) * code)
    elif name in ("Q4_K", "Q5_K"):
        d, e, codes, high = half(data[:2]), half(data[2:4]), data[-128:], data[16:48]
        for i in range(256):
            code = codes[i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15
            code += 16 * (high[i % 32] >> i // 32 & 1) if name == "Q5_K" else 0
            scale, lowest = six(data[4:16], i // 32)
            found.append(d * scale * code - e * lowest)
    else:
        low, high, scales, d = data[:128], data[128:192], struct.unpack("<16b", data[192:208]), half(data[208:])
        for i in range(256):
            n, at, quarter = i // 128, i % 32, i % 128 // 32
            code = low[64 * n + at + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
            code |= (high[32 * n + at] >> 2 * quarter & 3) << 4
            found.append(d * scales[8 * n + 2 * quarter + at // 16] * (code - 32))
    return found


@EVERY
def test_bytes_are_those_that_ggml_reads(name: str) -> None:
    weight = sample(blocks.scheme_of(name))
    stored, kind = blocks.pack(name, weight), TYPES[name]
    assert stored.dtype == torch.uint8 and stored.shape == (2, 2 * kind.nbytes)
    value = weight.dequantize(torch.float32)
    for row in range(2):
        data = bytes(stored[row].tolist())
        wanted = [x for at in range(0, len(data), kind.nbytes) for x in decode(name, data[at : at + kind.nbytes])]
        assert torch.equal(value[row], torch.tensor(wanted, dtype=torch.float64).to(torch.float32))
    assert torch.equal(blocks.unpack(name, stored), value)


@EVERY
def test_what_is_packed_is_unpacked(name: str) -> None:
    weight = sample(blocks.scheme_of(name), 3, 768)
    back = kquants.unpack(kquants.pack(weight), weight.scheme)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.levels.whole, weight.levels.whole)
    assert torch.equal(back.levels.d, weight.levels.d)
    if weight.levels.lowest is not None and weight.levels.e is not None:
        assert back.levels.lowest is not None and torch.equal(back.levels.lowest, weight.levels.lowest)
        assert back.levels.e is not None and torch.equal(back.levels.e, weight.levels.e)


@EVERY
def test_the_package_gguf_reads_the_same(name: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="the package gguf is not installed")
    weight = sample(blocks.scheme_of(name))
    read = quants.dequantize(kquants.pack(weight).numpy(), getattr(quants.GGMLQuantizationType, name))
    assert torch.equal(torch.from_numpy(read), weight.dequantize(torch.float32))


def test_only_its_own_type_holds_a_weight() -> None:
    for name in NAMES:
        assert blocks.fitting(blocks.span(sample(blocks.scheme_of(name)))) == [name]
