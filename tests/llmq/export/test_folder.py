"""Quantized folders as exports read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq.errors import LlmqError
from llmq.export.folder import QuantizedFolder

Tensors = dict[str, torch.Tensor]
CODES = torch.arange(-4, 4, dtype=torch.int8).repeat(2, 8)
SCALE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder with one weight of 8-bit codes, changed."""

    def make(tensors: Tensors, weights: dict[str, object] | None = None, **section: object) -> Path:
        told = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | (
            weights or {}
        )
        groups = {"group_0": {"targets": ["Linear"], "weights": told, "format": "int-quantized"}}
        quantized = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups} | section
        (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": quantized}))
        plain = {"a.norm.weight": torch.ones(64, dtype=torch.float16)}
        save_file(plain | {f"a.up.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return make


def test_codes_of_other_writers(write: Callable[..., Path]) -> None:
    folder = QuantizedFolder(write({"weight": CODES, "weight_scale": SCALE}))
    assert folder.weights == ["a.up.weight"] and folder.others == ["a.norm.weight"]
    assert folder.dtype == torch.float16 and folder.shape("a.up.weight") == (2, 64)
    assert "quantization_config" not in json.loads(folder.config_text)
    wanted = CODES.float() * SCALE.repeat_interleave(32, 1)
    assert torch.equal(folder.weight("a.up.weight").dequantize(torch.float32), wanted)
    zero = torch.tensor([[1, 2], [0, -3]], dtype=torch.int8)
    folder = QuantizedFolder(write({"weight": CODES, "weight_scale": SCALE, "weight_zero_point": zero}))
    wanted = (CODES.float() - zero.repeat_interleave(32, 1)) * SCALE.repeat_interleave(32, 1)
    assert torch.equal(folder.weight("a.up.weight").dequantize(torch.float32), wanted)
    one = {"strategy": "tensor", "group_size": None}
    folder = QuantizedFolder(write({"weight": CODES, "weight_scale": torch.tensor([2.0])}, one))
    assert torch.equal(folder.weight("a.up.weight").dequantize(torch.float32), CODES.float() * 2)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"weight_scale": SCALE}, "no weight has scales"),
        ({"weight": CODES.expand(2, 2, 64).contiguous(), "weight_scale": SCALE}, "is several matrices in a tensor"),
        ({"weight": CODES, "weight_scale": SCALE, "weight_g_idx": torch.zeros(64)}, "has groups in activation order"),
        ({"weight": CODES.to(torch.float8_e4m3fn), "weight_scale": SCALE}, "is float8_e4m3fn with scales"),
    ],
)
def test_what_no_export_reads(write: Callable[..., Path], tensors: Tensors, told: str) -> None:
    with pytest.raises(LlmqError, match=told):
        QuantizedFolder(write(tensors))


def test_tensors_that_do_not_fit(write: Callable[..., Path]) -> None:
    folder = QuantizedFolder(write({"weight": CODES, "weight_scale": torch.ones(2, 3)}))
    with pytest.raises(LlmqError, match=r"model.safetensors: a.up.weight: \[2, 64\] codes with scales \[2, 3\]"):
        folder.weight("a.up.weight")
    packed = {"weight_packed": torch.zeros(2, 4, dtype=torch.int32), "weight_shape": torch.tensor([2, 64])}
    folder = QuantizedFolder(write(packed | {"weight_scale": SCALE}, {"num_bits": 4}))
    with pytest.raises(LlmqError, match=r"a.up.weight: weight_packed of a 4-bit .* must be \[2, 8\], not \[2, 4\]"):
        folder.weight("a.up.weight")
    with pytest.raises(LlmqError, match="a.up.weight: bits must be a whole number"):
        QuantizedFolder(write(packed | {"weight_scale": SCALE}, {"num_bits": 9}))
