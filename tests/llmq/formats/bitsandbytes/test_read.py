"""bitsandbytes' 4-bit weights read for kernels: what is described is what bitsandbytes itself dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from llmq.checkpoint.tensors import TensorInfo, read_header
from llmq.formats.bitsandbytes.read import STATES, BitsandbytesReader
from llmq.formats.plain import CodebookWeight
from tests.llmq.formats.made import fits
from tests.llmq.refusal import refused

ROWS, WIDTH = 24, 128
MODULE = nn.Linear(WIDTH, ROWS)
NF4, FP4 = STATES


def config(kind: str = "nf4") -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)


def written(
    kind: str = "nf4", double: bool = False, block: int = 64, **changes: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight's tensors by suffix as bitsandbytes stores them, and what it makes of them."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    name = next(name for name in tensors if "quant_state" in name)
    said = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return tensors, functional.dequantize_4bit(packed, state)


def stored(folder: Path, tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    """What a file's header says of the weight, by suffix; the state is read from the file."""
    save_file({f"block.up.{suffix}": tensor for suffix, tensor in tensors.items()}, folder / "a.safetensors")
    return {name.removeprefix("block.up."): info for name, info in read_header(folder / "a.safetensors").items()}


def dense(weight: CodebookWeight) -> np.ndarray:
    """By the definition of the format: levels[code] · magnitude, whose own magnitudes are coded in blocks of 256."""
    packed = weight.packed.numpy()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    absmax = weight.absmax.numpy().astype(np.float64)
    if weight.nested_codebook is not None and weight.nested_absmax is not None:
        scales = np.repeat(weight.nested_absmax.double().numpy(), 256)[: len(absmax)]
        absmax = weight.nested_codebook.double().numpy()[weight.absmax.numpy()] * scales + weight.offset
    values = weight.codebook.double().numpy()[codes] * np.repeat(absmax, weight.block_size)[: len(codes)]
    return values.reshape(weight.out_features, weight.in_features)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_a_weight_is_what_bitsandbytes_makes_of_it(tmp_path: Path, kind: str, double: bool, block: int) -> None:
    tensors, expected = written(kind, double, block)
    layer = BitsandbytesReader(config(kind)).layer("block.up", MODULE, (ROWS, WIDTH), stored(tmp_path, tensors))
    assert layer is not None and fits(layer.entries, tensors) and set(layer.entries) == set(tensors)
    weight = layer.read(tensors)
    assert (weight.out_features, weight.in_features, weight.block_size) == (ROWS, WIDTH, block)
    assert (weight.nested_absmax is None) == (not double)
    assert np.allclose(dense(weight), expected.double().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_another_dtype_over_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    """bnb_4bit_quant_storage, which FSDP needs."""
    tensors, expected = written()
    tensors["weight"] = tensors["weight"].view(-1).view(dtype).view(-1, 1)
    layer = BitsandbytesReader(config()).layer("block.up", MODULE, (ROWS, WIDTH), stored(tmp_path, tensors))
    assert layer is not None and fits(layer.entries, tensors)
    assert np.allclose(dense(layer.read(tensors)), expected.double().numpy(), rtol=1e-5, atol=1e-6)


def test_codes_of_another_size_do_not_fit(tmp_path: Path) -> None:
    tensors, _ = written()
    tensors["weight"] = tensors["weight"][:-1]
    layer = BitsandbytesReader(config()).layer("block.up", MODULE, (ROWS, WIDTH), stored(tmp_path, tensors))
    assert layer is not None and not fits(layer.entries, tensors)
    assert layer.entries["weight"].shape == (ROWS * WIDTH // 2, 1)


def test_an_ordinary_weight_is_none_of_bitsandbytes(tmp_path: Path) -> None:
    there = stored(tmp_path, {"weight": torch.ones(ROWS, WIDTH)})
    assert BitsandbytesReader(config()).layer("block.up", MODULE, (ROWS, WIDTH), there) is None


def replaced(state: bytes) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({NF4: torch.tensor(list(state), dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [ROWS, WIDTH + 1]}, ("says [24, 129], the model needs [24, 128]",)),
        ({"quant_type": "fp4"}, ("says fp4, config.json nf4",)),
        ({"blocksize": 16}, ("has blocks of 16", "there are kernels for")),
        ({"nested_offset": 0.5, "nested_blocksize": 64}, ("(nested 64)", "(nested 256)")),
        ({"shape": 3}, ("does not describe a 4-bit weight",)),
        ({"shape": [1, 2, 3]}, ("does not describe a 4-bit weight",)),
        ({"blocksize": None}, ("does not describe a 4-bit weight",)),
    ],
)
def test_a_state_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    there = stored(tmp_path, written(**changes)[0])
    call = lambda: BitsandbytesReader(config()).layer("block.up", MODULE, (ROWS, WIDTH), there)  # noqa: E731
    refused(call, str(tmp_path / "a.safetensors"), f"block.up.{NF4}", *words)


@pytest.mark.parametrize("state", [b"{", b"\xff\xfe", b"[]", b"3"])
def test_a_state_that_is_no_json_object_is_named(tmp_path: Path, state: bytes) -> None:
    tensors, _ = written()
    replaced(state)(tensors)
    there = stored(tmp_path, tensors)
    call = lambda: BitsandbytesReader(config()).layer("block.up", MODULE, (ROWS, WIDTH), there)  # noqa: E731
    refused(call, f"block.up.{NF4} does not describe a 4-bit weight")


@pytest.mark.parametrize(("kind", "missing"), [("nf4", NF4), ("fp4", FP4)])
def test_a_weight_without_its_state_has_no_size(tmp_path: Path, kind: str, missing: str) -> None:
    tensors, _ = written(kind)
    del tensors[missing]
    there = stored(tmp_path, tensors)
    call = lambda: BitsandbytesReader(config(kind)).layer("block.up", MODULE, (ROWS, WIDTH), there)  # noqa: E731
    refused(call, str(tmp_path / "a.safetensors"), f"block.up.{missing} is missing")


def test_8_bits_are_left_to_stock_transformers() -> None:
    assert BitsandbytesReader.refusal(config()) is None
    assert "outliers" in (BitsandbytesReader.refusal(BitsAndBytesConfig(load_in_8bit=True)) or "")
