"""What is told of bitsandbytes' weights without reading them: 8 bits, 4 bits with and without their state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint.source import FolderSource
from llmq.formats.base import SMALL, Row, Unclear
from llmq.formats.bitsandbytes.inspect import COMPANIONS, SCALES, inspect
from tests.llmq.refusal import refused

OUT, IN = 32, 128
STATE = "weight.quant_state.bitsandbytes__nf4"


def row(folder: Path, tensors: dict[str, Tensor]) -> Row:
    """What is told of the weight a.up whose tensors these are."""
    (folder / "config.json").write_text("{}")
    save_file({f"a.up.{suffix}": tensor for suffix, tensor in tensors.items()}, folder / "model.safetensors")
    source = FolderSource(folder)
    return inspect(source, "a.up", {suffix: source.info(f"a.up.{suffix}") for suffix in tensors}, "bitsandbytes", {})


def state(**given: object) -> Tensor:
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, IN]} | given
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def four(blocks: int = OUT * IN // 64) -> dict[str, Tensor]:
    return {"weight": torch.zeros(OUT * IN // 2, 1, dtype=torch.uint8), "weight.absmax": torch.ones(blocks)}


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_8_bits_have_a_scale_per_row(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "SCB": torch.ones(OUT)}
    assert row(tmp_path, tensors) == Row("a.up.weight", (OUT, IN), "int", 8, 0, True, None, nbytes(tensors), "int8")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_are_what_their_state_says(tmp_path: Path, kind: str) -> None:
    name = f"weight.quant_state.bitsandbytes__{kind}"
    tensors = four(blocks=OUT * IN // 128) | {name: state(quant_type=kind, blocksize=128)}
    assert row(tmp_path, tensors) == Row("a.up.weight", (OUT, IN), kind, 4, 128, True, None, nbytes(tensors), "uint8")


@pytest.mark.parametrize(
    "tensors",
    [
        four(),  # its shape, and whether it is nf4 or fp4, is nowhere
        four() | {STATE: torch.zeros(SMALL, dtype=torch.uint8)},  # too large to read
        four() | {STATE: state(shape=[OUT, 2 * IN])},
        four(blocks=3) | {STATE: state()},
        {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "SCB": torch.ones(IN)},
    ],
    ids=["no state", "large", "shape", "blocks", "scales"],
)
def test_what_does_not_fit_is_not_told(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(Unclear):
        row(tmp_path, tensors)


@pytest.mark.parametrize(
    "damaged",
    [torch.tensor([1, 2, 3], dtype=torch.uint8), state(shape=3), state(blocksize=None), state(shape=["a", "b"])],
    ids=["no text", "no shape", "no block", "no numbers"],
)
def test_a_damaged_state_is_named(tmp_path: Path, damaged: Tensor) -> None:
    file = tmp_path / "model.safetensors"
    refused(
        lambda: row(tmp_path, four() | {STATE: damaged}), str(file), f"a.up.{STATE} is damaged", "download it again"
    )


def test_every_tensor_that_stock_bitsandbytes_stores_belongs_to_its_weight() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for kind in ("nf4", "fp4"):
        _, made = functional.quantize_4bit(torch.randn(32, 64), compress_statistics=True, quant_type=kind)
        assert {f"weight.{key}" for key in made.as_dict(packed=True)} <= set(COMPANIONS["weight"])
    assert set(SCALES) <= set(COMPANIONS["weight"])
