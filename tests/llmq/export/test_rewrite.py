"""`llmq export --to mlx, gptq, awq`: folders that stand for the same numbers, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmq
from llmq.errors import LlmqError
from llmq.export import rewrite as module
from llmq.export.folder import INPUTS, QuantizedFolder
from llmq.export.rewrite import rewrite
from llmq.export.targets import TARGETS
from llmq.formats.inspection import inspect_folder
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Calibration, Recipe

Quantize = Callable[..., Path]
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Folders by scheme."""

    def make(scheme: Scheme, **more: Any) -> Path:
        out = tmp_path_factory.mktemp("quantized") / "m"
        llmq.quantize(str(tiny_model), out, Recipe(("rtn",), scheme, calibration=Calibration("demo", 1, 32), **more))
        return out

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("to", "scheme", "told"),
    [
        ("mlx", Scheme(4, 64), {"bits": 4, "group_size": 64, "mode": "affine"}),
        ("mlx", Scheme(3, None), {"bits": 3, "group_size": 64, "mode": "affine"}),
        ("mlx", Scheme(7, 32), {"bits": 8, "group_size": 32, "mode": "affine"}),
        ("mlx", Scheme(5, 32, False), {"bits": 5, "group_size": 32, "mode": "affine"}),
        ("mlx", Scheme(4, 32, grid="mxfp4"), {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        ("gptq", Scheme(4, 32), {"bits": 4, "group_size": 32, "sym": True}),
        ("gptq", Scheme(8, None), {"bits": 8, "group_size": -1, "sym": True}),
        ("awq", Scheme(4, 32, False), {"bits": 4, "group_size": 32, "zero_point": True}),
    ],
    ids=str,
)
def test_folders(quantized: Quantize, tmp_path: Path, to: str, scheme: Scheme, told: dict[str, Any]) -> None:
    path, out = quantized(scheme, keep=("*.1.mlp.*",), loader="transformers"), tmp_path / to
    done = rewrite(path, out, to)
    config = json.loads((out / "config.json").read_text())
    section = config["quantization"] if to == "mlx" else config["quantization_config"]
    assert {key: section[key] for key in told} == told
    assert (out / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    assert done.nbytes == sum(file.stat().st_size for file in out.iterdir()) and "lm_head.weight" in done.dense
    folder, stored = QuantizedFolder(path), tensors(out)
    # The models are in float32, which holds MLX's biases; the others' scales are float16.
    assert done.worst < 2.0**-10
    for name in folder.weights:
        inside = name.removesuffix("weight")
        mine = {part.removeprefix(inside): tensor for part, tensor in stored.items() if part.startswith(inside)}
        own = section.get(inside.removesuffix("."), section)
        whole = {**told, **own, "group_size": own["group_size"] if own["group_size"] > 0 else len(mine["g_idx"])}
        found = TARGETS[to].unpack(mine, whole)
        assert torch.allclose(found, folder.weight(name).dequantize(torch.float32), rtol=2.0**-10, atol=1e-4)
    assert torch.equal(stored["lm_head.weight"], folder.source.read("lm_head.weight"))
    left = [row.name for row in inspect_folder(out).rows if row.bits is None and "proj" in row.name]
    kept = [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
    assert sorted(left) == [f"{module}.weight" for module in kept] and not inspect_folder(out).unknown
    # A whole module may be left alone; loaders convert what is not listed.
    if to == "gptq":
        assert {f"-:{re.escape(module)}$" for module in kept} <= section["dynamic"].keys() and not section["lm_head"]
    if to == "awq":
        assert {*kept, "lm_head"} <= {*section["modules_to_not_convert"]}


def test_settings_of_each_module(quantized: Quantize, tmp_path: Path) -> None:
    path = quantized(Scheme(4, 64), overrides=(("*.down_proj", Scheme(8, 32)),))
    done = rewrite(path, tmp_path / "out", "mlx")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert section[DOWN] == {"group_size": 32, "bits": 8, "mode": "affine"} and section["bits"] == 4
    assert len(done.schemes) == 2 and not any("up_proj" in key for key in section)
    with pytest.raises(LlmqError, match="a folder of GPTQ has one scheme for all weights, not 4-bit .*, 8-bit"):
        rewrite(path, tmp_path / "other", "gptq")
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("to", "scheme", "told"),
    [
        ("mlx", Scheme(4, 16), "MLX has groups of 32, 64, 128, and 16 is a multiple of none"),
        ("mlx", Scheme(4, 16, grid="nvfp4"), "MLX does not hold nvfp4 g16 as it is"),
        ("gptq", Scheme(5, 32), "GPTQ folders hold integers of 2, 3, 4, 8 bits, not 5-bit"),
        ("awq", Scheme(3, 32), "AWQ folders hold integers of 4 bits, not 3-bit"),
    ],
    ids=str,
)
def test_what_a_format_does_not_hold(quantized: Quantize, tmp_path: Path, to: str, scheme: Scheme, told: str) -> None:
    path = quantized(scheme)
    with pytest.raises(LlmqError) as error:
        rewrite(path, tmp_path / "out", to)
    assert str(error.value).startswith(f"{path}: model.layers.0.") and told in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_a_quantized_head_and_rounded_inputs(quantized: Quantize, tmp_path: Path) -> None:
    path = quantized(Scheme(8, None, activations=Activations()), include=("lm_head",))
    assert rewrite(path, tmp_path / "gptq", "gptq").warnings == (INPUTS,)
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["lm_head"]
    with pytest.raises(LlmqError, match="outside the decoder's blocks"):
        rewrite(quantized(Scheme(4, 32, False), include=("lm_head",)), tmp_path / "awq", "awq")


def test_nothing_is_half_written(quantized: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = quantized(Scheme(4, 32)), tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(LlmqError, match="is there already: give the name of a new folder"):
        rewrite(path, out, "mlx")
    (out / "mine").unlink()
    with pytest.raises(LlmqError, match="there is no folder"):
        rewrite(path, tmp_path / "none" / "out", "mlx")

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with monkeypatch.context() as patch, pytest.raises(LlmqError, match="cannot write somewhere: No space left"):
        patch.setattr(module, "put", full)
        rewrite(path, out, "mlx")
    right = TARGETS["awq"]
    wrong = replace(right, pack=lambda weight, told: right.pack(weight, told) | {"scales": weight.scale.t() * 2})
    with monkeypatch.context() as patch, pytest.raises(LlmqError, match="as AWQ is not what it was made of"):
        patch.setitem(TARGETS, "awq", wrong)
        rewrite(path, out, "awq")
    assert [found.name for found in tmp_path.iterdir()] == ["out"] and not [*out.iterdir()]
    rewrite(path, out, "awq")
    assert (out / "config.json").exists()


def test_the_same_logits(quantized: Quantize, tmp_path: Path) -> None:
    """By llmq's readers of GPTQ and AWQ, which read other tools' folders, and transformers' own configurations."""
    path, ids = quantized(Scheme(4, 32)), torch.arange(32)[None]
    found = []
    for to in ("", "gptq", "awq"):
        folder = path if not to else rewrite(path, tmp_path / to, to).path
        with torch.no_grad():
            found.append(llmq.load(folder, dtype="float32")(ids).logits)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=0)
    # Scales of a model in float32 are rounded to float16.
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)
