"""A stack of MXFP4 weights: what is told of it from its headers, and its values, bit for bit as by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.formats import dequantized
from llmq.formats.base import Row, Unclear
from llmq.formats.dequantized import Dequantized, open_source
from llmq.formats.mxfp4 import inspect
from tests.llmq.formats import published
from tests.llmq.formats.made import FILE, TensorInfo
from tests.llmq.refusal import refused

NONE: Any = None


def row(codes: Tensor, scales: Tensor) -> Row:
    tensors = {"_blocks": codes, "_scales": scales}
    parts = {end: TensorInfo(f"a.up{end}", t.dtype, tuple(t.shape), FILE, 0, t.nbytes) for end, t in tensors.items()}
    return inspect(NONE, "a.up", parts, "mxfp4", {})


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def test_bits_and_shape() -> None:
    found = row(u8(3, 10, 2, 16), u8(3, 10, 2))
    assert found == Row("a.up", (3, 10, 64), "float", 4, 32, True, None, 3 * 10 * (32 + 2), "uint8")


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (u8(3, 10, 2, 16), u8(3, 10, 1)),
        (u8(3, 10, 2, 8), u8(3, 10, 2)),
        (u8(3, 10, 2, 16).to(torch.int32), u8(3, 10, 2)),
        (u8(2, 16), u8(2)),
    ],
)
def test_what_does_not_fit(codes: Tensor, scales: Tensor) -> None:
    with pytest.raises(Unclear, match="with scales"):
        row(codes, scales)


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return published.rewrite(path, {"quant_method": "mxfp4"}, lambda stored: stored)


def stack(*shape: int) -> tuple[Tensor, Tensor]:
    """Any codes, and exponents over the whole range."""
    seeded = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=seeded)
    return codes, torch.randint(0, 253, shape, dtype=torch.uint8, generator=seeded)


@pytest.mark.parametrize("chunk", [1 << 22, 1, 3 * 96])
def test_values_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr(dequantized, "CHUNK", chunk)
    codes, scales = stack(5, 20, 3)
    bias, other = torch.ones(5, 20).bfloat16(), torch.ones(3, dtype=torch.bfloat16)
    tensors = {"m.up_blocks": codes, "m.up_scales": scales, "m.up_bias": bias, "rope_scales": other}
    source = open_source(folder(tmp_path, tensors))
    assert isinstance(source, Dequantized) and sorted(source.names()) == ["m.up", "m.up_bias", "rope_scales"]
    expected = convert_moe_packed_tensors(codes, scales)
    assert expected.shape == source.info("m.up").shape == (5, 96, 20) and expected.dtype == torch.bfloat16
    assert torch.equal(source.read("m.up"), expected) and torch.isfinite(expected).all()
    for start, stop in ((0, 1), (4, 5), (1, 4), (2, 2)):
        assert torch.equal(source.read_rows("m.up", start, stop), expected[start:stop])


def test_one_expert_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = stack(5, 20, 3)
    source = open_source(folder(tmp_path, {"m.up_blocks": codes, "m.up_scales": scales}))
    assert isinstance(source, Dequantized)
    read: list[tuple[str, int, int]] = []
    rows = source.base.read_rows
    monkeypatch.setattr(source.base, "read_rows", lambda *which: read.append(which) or rows(*which))
    monkeypatch.setattr(source.base, "read", None)
    source.read_rows("m.up", 3, 4)
    assert read == [("m.up_blocks", 3, 4), ("m.up_scales", 3, 4)]


CODES, SCALES = stack(5, 20, 3)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"up_blocks": CODES}, ("up_blocks", "scales (up_scales) are missing")),
        ({"up_scales": SCALES}, ("up_scales", "(up_blocks)", "missing")),
        ({"up_blocks": CODES, "up_scales": SCALES[:, :19].clone()}, ("[5, 19, 3] for codes [5, 20, 3, 16]",)),
        ({"up_blocks": CODES, "up_scales": SCALES.float()}, ("up_scales is bfloat16", "uint8")),
        ({"up_blocks": CODES[0].clone(), "up_scales": SCALES[0].clone()}, ("for codes [20, 3, 16]",)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Tensor], words: tuple[str]) -> None:
    path = folder(tmp_path, tensors)
    refused(lambda: open_source(path), "model.safetensors", "start from the unquantized model", *words)


def test_an_exponent_that_is_no_number_is_refused_for_its_expert_alone(tmp_path: Path) -> None:
    scales = SCALES.clone()
    scales[2, 7, 1] = 255
    source = open_source(folder(tmp_path, {"up_blocks": CODES, "up_scales": scales}))
    refused(lambda: source.read("up"), "up_scales", "255", "expert 2", "model.safetensors")
    assert torch.isfinite(source.read_rows("up", 3, 5)).all()
