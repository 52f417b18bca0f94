"""An adapter's two files: each change against PEFT's own, and what is more than plain LoRA refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from llmq.adapters.lora import Adapter
from tests.llmq.adapters.made import load, write_adapter
from tests.llmq.refusal import refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_dora": True}, "use_dora in adapter_config.json is not as it was in training"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"target_parameters": ["experts.w"]}, "outside linear layers"),
    ],
)
def test_adapters_that_are_more_than_lora(tmp_path: Path, adapter: Path, change: dict[str, Any], words: str) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    refused(lambda: Adapter(folder), str(folder), words)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.0.*.up_proj": 32, "k_proj": 1}},
    ],
    ids=["plain", "rank-stabilized", "patterns"],
)
def test_each_change_is_the_one_that_peft_computes(tmp_path: Path, tiny_model: Path, options: dict[str, Any]) -> None:
    from peft import PeftModel
    from peft.tuners.lora import Linear

    adapter = Adapter(write_adapter(tmp_path, tiny_model, **options))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in PeftModel.from_pretrained(load(tiny_model), tmp_path).named_modules()
        if isinstance(module, Linear)
    }
    assert adapter.factors.keys() == layers.keys()
    for name, factors in adapter.factors.items():
        expected = layers[name].get_delta_weight("default").detach()
        assert factors.module == name and factors.shape == tuple(expected.shape)
        delta = factors.delta()
        assert delta.dtype == torch.float32 and torch.allclose(delta, expected, rtol=1e-5, atol=1e-7), name


def written(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter's files as they are given."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6} | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def halves(rank: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One module's factors, for a weight [5, 7]."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator)
    start = "base_model.model.layers.0.up.lora_"
    return {f"{start}A.weight": a.to(dtype), f"{start}B.weight": b.to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_alpha_over_rank_times_the_product(tmp_path: Path, dtype: torch.dtype) -> None:
    """By the definition, in float64; factors stored in half precision are multiplied in float32."""
    tensors = halves(dtype=dtype)
    a, b = (value.double() for value in tensors.values())
    change = Adapter(written(tmp_path, tensors)).factors["layers.0.up"]
    assert change.scale == 2.0 and change.shape == (5, 7)
    assert torch.allclose(change.delta().double(), 2 * b @ a, rtol=1e-6, atol=1e-6)


def test_the_digest_is_of_both_files(tmp_path: Path) -> None:
    folder = written(tmp_path, halves())
    both = (folder / "adapter_config.json").read_bytes() + (folder / "adapter_model.safetensors").read_bytes()
    assert Adapter(folder).digest == hashlib.sha256(both).hexdigest()


def test_what_finetune_wrote_is_read_and_an_adapter_from_elsewhere_has_none(tmp_path: Path) -> None:
    folder = written(tmp_path, halves(), base_model_name_or_path="org/base")
    assert (Adapter(folder).record, Adapter(folder).base) == ({}, "org/base")
    (folder / "finetune.json").write_text('{"base": {"bits": 4}}')
    assert Adapter(folder).record == {"base": {"bits": 4}}
    assert Adapter(written(tmp_path, halves(), base_model_name_or_path=None)).base == ""


def test_a_folder_without_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: Adapter(tmp_path), str(tmp_path), "adapter_config.json", "give the folder that finetune wrote")
    folder = written(tmp_path / "a", halves())
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    words = refused(
        lambda: Adapter(folder), str(folder), "pickles are not read", "save_pretrained", "convert it once: "
    )
    monkeypatch.chdir(folder)
    import safetensors.torch  # noqa: F401

    exec("import torch, safetensors.torch; " + words.split("convert it once: ")[1])  # noqa: S102  the way out works
    assert Adapter(folder).factors.keys() == {"layers.0.up"}


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    """PEFT saves adapters with a name into folders, and trainers save one at each checkpoint."""
    for name in ("checkpoint-10", "checkpoint-20"):
        written(tmp_path / name, halves())
    words = refused(lambda: Adapter(tmp_path), "2 folders in it have one", "give one of them")
    assert Adapter(Path(words.split("such as ")[1])).factors
    refused(lambda: Adapter(tmp_path / "none"), "is not a folder", "hf download")


def test_a_damaged_factor_is_named(tmp_path: Path) -> None:
    tensors = halves()
    tensors["base_model.model.layers.0.up.lora_A.weight"][1, 2] = float("nan")
    refused(lambda: Adapter(written(tmp_path, tensors)), "up.lora_A.weight", "adapter_model.safetensors", "[1, 2]")


def test_what_else_an_adapter_holds(tmp_path: Path) -> None:
    """Whole parameters, PEFT's copies of the base's, biases and rows, each under the name of its parameter."""
    start = "base_model.model."
    more = {
        "layers.0.up.lora_B.bias": torch.ones(5),
        "norm.weight": torch.ones(7),
        "head.base_layer.weight": torch.ones(9, 7),
        "layers.0.up.base_layer.bias": torch.ones(5),
        "tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 7),
        "tokens.token_adapter.base_layer.weight": torch.ones(9, 7),
        "tokens.original_module.weight": torch.ones(9, 7),
    }
    tensors = halves() | {start + name: value for name, value in more.items()}
    config = {"modules_to_save": ["norm"], "bias": "lora_only", "trainable_token_indices": {"tokens": [4, 1]}}
    adapter = Adapter(written(tmp_path, tensors, **config))
    assert adapter.values.keys() == {"norm.weight", "head.weight", "layers.0.up.bias", "tokens.weight"}
    assert adapter.copies == {"head.weight", "tokens.weight"}
    assert adapter.rows["tokens"].ids == (4, 1) and adapter.shifts["layers.0.up"].scale == 2.0
    refused(
        lambda: Adapter(written(tmp_path, tensors, **(config | {"trainable_token_indices": [4]}))),
        "tokens has 2 trained rows",
        "trainable_token_indices",
    )


def test_dora_by_its_definition(tmp_path: Path) -> None:
    """Each row of the sum has the norm of the magnitude; in float64."""
    generator = torch.Generator().manual_seed(2)
    weight, norms = torch.randn(5, 7, generator=generator), torch.rand(5, generator=generator) + 0.5
    tensors = halves() | {"base_model.model.layers.0.up.lora_magnitude_vector": norms}
    merged = Adapter(written(tmp_path, tensors, use_dora=True)).factors["layers.0.up"].merged(weight)
    a, b = (value.double() for value in halves().values())
    total = weight.double() + 2 * b @ a
    expected = total * (norms.double() / total.square().sum(1).sqrt())[:, None]
    assert torch.allclose(merged.double(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["adapter_config.json", "finetune.json"])
@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ("[1]", "is not a JSON object")])
def test_damaged_json_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    folder = written(tmp_path, halves())
    (folder / name).write_text(text)
    refused(lambda: Adapter(folder), str(folder / name), words, "write the adapter again")


def test_half_an_adapter(tmp_path: Path) -> None:
    for lost in halves():
        left = {name: value for name, value in halves().items() if name != lost}
        refused(lambda left=left: Adapter(written(tmp_path, left)), str(tmp_path), "layers.0.up lacks A or B")
    odd = halves() | {"base_model.model.layers.0.up.lora_B.weight": torch.ones(5, 4)}
    refused(lambda: Adapter(written(tmp_path, odd)), "layers.0.up", "their shapes do not match")
    refused(lambda: Adapter(written(tmp_path, {})), "adapter_model.safetensors", "holds no adapter")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.up.lora_magnitude_vector", (1, 5, 1, 1)),
        ("layers.0.up.lora_A.default.weight", (3, 7)),
        ("layers.0.up.lora_C.weight", (3, 7)),
        ("layers.0.conv.lora_A.weight", (3, 7, 1)),
    ],
)
def test_tensors_that_are_no_half_of_a_linear_layer(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    more = halves() | {f"base_model.model.{name}": torch.ones(shape)}
    refused(lambda: Adapter(written(tmp_path, more)), name, str([*shape]), "merge it with the tool that trained it")


def test_everything_that_is_too_much_is_told_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, halves(), use_qalora=True, kasa_config={"a": 1}, init_lora_weights="PiSSA")
    refused(lambda: Adapter(folder), "QA-LoRA", "KaSA", "initialization PiSSA", "merge_and_unload")


def test_an_initialization_that_leaves_the_base_alone_is_read(tmp_path: Path) -> None:
    for start in (True, False, "gaussian", "eva"):
        assert Adapter(written(tmp_path, halves(), init_lora_weights=start)).factors


def test_the_folder_that_peft_wrote_is_left_as_it_was(tmp_path: Path, adapter: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for factors in Adapter(folder).factors.values():
        factors.delta().zero_()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_file(folder / "adapter_model.safetensors")
