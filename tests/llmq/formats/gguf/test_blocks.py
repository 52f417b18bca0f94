"""GGUF's blocks, decoded value by value as ggml's C code does, and by the package gguf where it is installed."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import torch

from llmq.errors import LlmqError
from llmq.formats.gguf import blocks
from llmq.formats.gguf.blocks import Span, fitting, pack, refusal, round_q8, span, unpack
from llmq.formats.gguf.types import TYPES
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.scheme import Scheme

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def sample(scheme: Scheme, width: int = 512, low: int | None = None, high: int | None = None) -> QuantizedWeight:
    """Random codes, scales of both signs, zero points; FP4 by rounding."""
    torch.manual_seed(0)
    if scheme.grid != "int":
        found = rounding_of(scheme.rules).round(torch.randn(3, width) * 0.02, scheme, torch.bfloat16, "mse", None)
        assert isinstance(found, QuantizedWeight)
        return found
    lowest, highest = scheme.qmin if low is None else low, scheme.qmax if high is None else high
    codes = torch.randint(lowest, highest + 1, (3, width), dtype=torch.int8)
    codes[0, :2] = torch.tensor([lowest, highest])
    scale = (torch.randn(3, scheme.groups(width)) * 0.02).to(torch.bfloat16)
    zero = None if scheme.symmetric else torch.randint(scheme.qmin, scheme.qmax + 1, scale.shape, dtype=torch.int8)
    return QuantizedWeight(codes, scale, zero, scheme)


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def nibble(data: bytes, at: int, count: int) -> int:
    return data[at] & 15 if at < count // 2 else data[at - count // 2] >> 4


def decode(name: str, data: bytes) -> list[float]:
    """One block."""
    if name in ("Q4_0", "Q4_1"):
        d, m, codes = half(data[:2]), half(data[2:4]), data[-16:]
        found = [nibble(codes, j, 32) for j in range(32)]
        return [d * q + m for q in found] if name == "Q4_1" else [d * (q - 8) for q in found]
    if name in ("Q5_0", "Q5_1"):
        d, m, (high,), codes = half(data[:2]), half(data[2:4]), struct.unpack("<I", data[-20:-16]), data[-16:]
        found = [nibble(codes, j, 32) | (high >> j & 1) << 4 for j in range(32)]
        return [d * q + m for q in found] if name == "Q5_1" else [d * (q - 16) for q in found]
    if name == "Q8_0":
        return [half(data[:2]) * q for q in struct.unpack("<32b", data[2:])]
    if name == "Q2_0":
        return [half(data[:2]) * ((data[2 + j // 4] >> j % 4 * 2 & 3) - 1) for j in range(64)]
    if name == "TQ2_0":
        at = [(j // 128 * 32 + j % 32, j % 128 // 32) for j in range(256)]
        return [half(data[-2:]) * ((data[byte] >> 2 * place & 3) - 1) for byte, place in at]
    if name == "TQ1_0":
        at = [(j % 32, j // 32) if j < 160 else (32 + j % 16, (j - 160) // 16) for j in range(240)]
        at += [(48 + j % 4, (j - 240) // 4) for j in range(240, 256)]
        return [half(data[-2:]) * ((data[byte] * 3**place % 256 * 3 >> 8) - 1) for byte, place in at]
    if name == "MXFP4":
        return [2.0 ** (data[0] - 127) * value(nibble(data[1:], j, 32)) for j in range(32)]
    scales = [(8 + s % 8) / 8 * 2.0 ** (s // 8 - 7) if s // 8 else s * 2.0**-9 for s in data[:4]]
    return [scales[j // 16] * value(nibble(data[4 + j // 16 * 8 :], j % 16, 16)) for j in range(64)]


def value(code: int) -> float:
    return E2M1[code & 7] * (-1 if code & 8 else 1)


CASES = [
    (Scheme(4, 32), None, None, ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    (Scheme(4, 64, False), None, None, ("Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    (Scheme(5, None), None, None, ("Q5_0", "Q5_1", "Q8_0")),
    (Scheme(5, 32, False), None, None, ("Q5_1", "Q8_0")),
    (Scheme(8, 128), None, None, ("Q8_0",)),
    (Scheme(2, 64), None, None, ("Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    (Scheme(2, 256), -1, 1, ("TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    (Scheme(grid="mxfp4", group_size=32), None, None, ("MXFP4",)),
    (Scheme(grid="nvfp4", group_size=16), None, None, ("NVFP4",)),
]
NAMED = [(scheme, low, high, name) for scheme, low, high, names in CASES for name in names]


@pytest.mark.parametrize(("scheme", "low", "high", "names"), CASES, ids=str)
def test_types_that_hold_a_weight(scheme: Scheme, low: int | None, high: int | None, names: tuple[str, ...]) -> None:
    assert tuple(fitting(span(sample(scheme, low=low, high=high)))) == names


@pytest.mark.parametrize(("scheme", "low", "high", "name"), NAMED, ids=str)
def test_blocks_value_by_value(scheme: Scheme, low: int | None, high: int | None, name: str) -> None:
    weight = sample(scheme, low=low, high=high)
    packed, kind = pack(name, weight), TYPES[name]
    assert packed.shape == (3, 512 // kind.values * kind.nbytes)
    each = [bytes(block.tolist()) for block in packed.view(-1, kind.nbytes)]
    found = torch.tensor([decode(name, block) for block in each]).view(3, 512)
    assert torch.equal(unpack(name, packed), found)
    found *= blocks.tensor_scale(weight) if name in blocks.SCALED else 1.0
    wanted = weight.dequantize(torch.float32)
    if name in blocks.AFFINE and weight.zero is not None:
        # A half of the last place of m, which is at most 2^bits − 1 scales.
        most = float(weight.scale.float().abs().amax()) * (2**scheme.bits - 1) * 2.0**-11
        assert 0 < float((found - wanted).abs().amax()) <= most
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("scheme", "low", "high", "name"), [case for case in NAMED if case[-1] != "Q2_0"], ids=str)
def test_blocks_by_the_package(scheme: Scheme, low: int | None, high: int | None, name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; value by value they are tested above")
    packed = pack(name, sample(scheme, low=low, high=high))
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(unpack(name, packed), torch.from_numpy(found.copy()))


def test_rounding_to_eight_bits() -> None:
    torch.manual_seed(0)
    dense = torch.randn(4, 96)
    dense[1, :32] = 0
    found = unpack("Q8_0", round_q8(dense))
    step = dense.view(4, 3, 32).abs().amax(-1, keepdim=True).to(torch.float32) / 127
    away = (found.view(4, 3, 32) - dense.view(4, 3, 32)).abs()
    assert bool((away <= step * (0.5 + 127 * 2.0**-11) + 1e-12).all())
    assert not found[1, :32].any()


def test_scales_that_float16_lacks() -> None:
    weight = sample(Scheme(4, 32))
    large = QuantizedWeight(weight.codes, weight.scale * 2.0**25, None, weight.scheme)
    with pytest.raises(LlmqError, match="too large for float16, as GGUF has them: --keep the weight"):
        pack("Q4_0", large)
    with pytest.raises(LlmqError, match="does not read GGUF tensors of type Q8_K"):
        unpack("Q8_K", torch.zeros(1, 292, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"group": 48}, "groups of 48 are no multiple of 32"),
        ({"width": 80, "group": 80}, "its 80 inputs are no multiple of 32"),
        ({"low": -200, "high": 200, "bits": 8}, "no GGUF type holds 8 bits with zero points"),
        ({"layout": "mxfp6-pack-quantized", "bits": 6}, "no GGUF type holds mxfp6-pack-quantized in groups of 32"),
    ],
)
def test_refusals(change: dict[str, int], told: str) -> None:
    need = Span(**({"width": 960, "group": 32, "low": -8, "high": 7, "bits": 4} | change))  # type: ignore[arg-type]
    assert not fitting(need) and told in refusal(need)


def test_signs_turn_where_that_helps() -> None:
    """Codes from −2 on are 2-bit values up to 2 with negative d; from −8 to 8 they are in no type of 4 bits."""
    make: Callable[[int, int], Span] = lambda low, high: Span(512, 64, low, high, 5)  # noqa: E731
    assert fitting(make(-2, 1))[0] == fitting(make(-1, 2))[0] == "Q2_0"
    assert fitting(make(-7, 8))[0] == "Q4_0" and fitting(make(-8, 8))[0] == "Q5_0"
