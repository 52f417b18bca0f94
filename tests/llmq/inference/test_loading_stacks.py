"""Experts that are parts of parameters, packed from stacks with --loader llmq: loaded packed, damage is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import llmq
from llmq import job
from llmq.formats.stacks import parse
from llmq.inference.stack import PackedStack
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.mixtures import W4
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32, seed=2)
KINDS = ("llama4_text", "jetmoe", "dbrx")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quantized model in `out`; do not change it."""
    folder = tmp_path_factory.mktemp(request.param)
    mixtures.write(request.param, folder / "m")
    job.quantize(str(folder / "m"), folder / "out", Recipe(methods=("rtn",), scheme=W4, loader="llmq"), ids=IDS)
    return folder


def load(folder: Path) -> Any:
    return llmq.load(folder, dtype="float32", device_map="cpu")


@pytest.mark.slow
def test_they_stay_packed_and_stock_transformers_refuses_them(folder: Path) -> None:
    before, _ = mixtures.load(folder / "m")
    stacks = {n for n, p in before.named_parameters() if p.dim() == 3 or ".ffn.experts." in n}
    loaded = load(folder / "out")
    packed = {n for n, m in loaded.named_modules() if isinstance(m, PackedStack)}
    assert packed == stacks and stacks
    assert not stacks & {n for n, _ in loaded.named_parameters()}
    with pytest.raises(ValueError, match="format"):
        mixtures.load(folder / "out")


def weight_of(tensors: dict[str, Tensor], number: int) -> str:
    """The stem of the first weight of an expert of this number."""
    stems = sorted(name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed"))
    return next(stem for stem in stems if (found := parse(stem)) is not None and found[1] == number)


@pytest.mark.parametrize("number", [1, 3])
def test_a_missing_expert_is_named(number: int, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = mixtures.stored(folder / "out")
    stem = weight_of(tensors, number)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{stem}.")}
    save_file(kept, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    # The number of matrices below each other is that of the last one.
    refused(lambda: load(tmp_path / "m"), "model.safetensors", "expert")


def test_an_expert_of_another_shape_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Any] = mixtures.stored(folder / "out")
    stem = weight_of(tensors, 1)
    for suffix in ("weight_packed", "weight_scale"):
        tensors[f"{stem}.{suffix}"] = tensors[f"{stem}.{suffix}"][:-16].clone()
    tensors[f"{stem}.weight_shape"] = tensors[f"{stem}.weight_shape"] - torch.tensor([16, 0])
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    refused(lambda: load(tmp_path / "m"), "model.safetensors", stem)
