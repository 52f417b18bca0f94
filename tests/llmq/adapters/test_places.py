"""Names of another class, or of an older transformers: found by transformers' rules, merged as PEFT merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from llmq.adapters.lora import Adapter
from llmq.adapters.merged import Merged, open_base
from llmq.adapters.places import Place, Places
from llmq.discovery.named import build_named
from tests.llmq.adapters.made import apart, newer_peft, peft_merged, rewritten, stock_merged, trained
from tests.llmq.refusal import refused

TEXT = r".*language_model.*(q_proj|up_proj)"


def whole() -> Any:
    """The class that opens all of a vision-language checkpoint."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText


def merged(base: Path, adapter: Path) -> Merged:
    return Merged(open_base(base), Adapter(adapter))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["qwen3_5", "gemma3", "qwen2_vl"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": TEXT},
        {"target_modules": "all-linear"},
        {"target_modules": TEXT, "modules_to_save": ["merger", "multi_modal_projector"], "use_dora": True},
    ],
    ids=["text", "all", "saved"],
)
def test_trained_on_the_class_that_opens_all(
    tmp_path: Path, bases: dict[str, Path], base: str, options: dict[str, Any]
) -> None:
    """The parts that the causal class leaves out are merged too, and the rest stays as it is."""
    folder = trained(tmp_path / "adapter", bases[base], whole(), **options)
    source = merged(bases[base], folder)
    assert apart(stock_merged(source, tmp_path / "out", whole()), peft_merged(bases[base], folder, whole())) <= 1e-3
    assert len(source.changes) >= len(source.adapter.factors) > 0


def test_trained_on_the_causal_class_of_a_vision_language_checkpoint(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = trained(tmp_path / "adapter", bases["qwen3_5"], target_modules="all-linear")
    source = merged(bases["qwen3_5"], folder)
    assert apart(stock_merged(source, tmp_path / "out"), peft_merged(bases["qwen3_5"], folder)) <= 1e-3
    assert all("language_model" in name for name in source.changes)


@pytest.mark.parametrize(
    ("base", "pairs"),
    [
        ("gemma3", [("model.model.language_model.", "model.language_model.model.")]),
        ("gemma3", [("model.model.", "model.")]),
        ("qwen2_vl", [("model.model.language_model.", "model.model."), ("model.model.visual.", "model.visual.")]),
        ("llama", [("model.model.", "model.")]),
    ],
    ids=["gemma3-language_model.model", "gemma3-no-head", "qwen2_vl-model.layers", "llama-no-head"],
)
def test_names_of_an_older_transformers(
    tmp_path: Path, bases: dict[str, Path], base: str, pairs: list[tuple[str, str]]
) -> None:
    """PEFT itself does not find them; the reference is its merge of the same adapter with today's names."""
    kind = None if base == "llama" else whole()
    targets = "all-linear" if base != "gemma3" else TEXT
    folder = trained(tmp_path / "adapter", bases[base], kind, target_modules=targets)
    old = rewritten(tmp_path / "old", folder, *pairs)
    assert load_file(old / "adapter_model.safetensors").keys() != load_file(folder / "adapter_model.safetensors").keys()
    state = stock_merged(merged(bases[base], old), tmp_path / "out", kind)
    assert apart(state, peft_merged(bases[base], folder, kind)) <= 1e-3


@newer_peft
def test_experts_named_one_by_one(tmp_path: Path, bases: dict[str, Path]) -> None:
    """As transformers 4 named them; today the model keeps all experts in one parameter, and the checkpoint does not."""
    from peft import PeftModel

    from tests.llmq.adapters.made import opened

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, value in load_file(bases["mixtral"] / "model.safetensors").items():
        if ".experts." in name or "q_proj" in name:
            start = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            tensors[f"{start}A.weight"] = torch.randn(4, value.shape[1], generator=generator) * 0.05
            tensors[f"{start}B.weight"] = torch.randn(value.shape[0], 4, generator=generator) * 0.05
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    source = merged(bases["mixtral"], folder)
    reference = PeftModel.from_pretrained(opened(bases["mixtral"]), folder).merge_and_unload().state_dict()
    assert len(source.changes) == 26
    assert apart(stock_merged(source, tmp_path / "out"), dict(reference)) <= 1e-3


def test_a_name_of_no_class(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = trained(tmp_path / "adapter", bases["qwen3_5"], target_modules=["q_proj"])
    other = rewritten(tmp_path / "other", folder, (".self_attn.", ".cross_attn."))
    refused(lambda: merged(bases["qwen3_5"], other), "cross_attn.q_proj", "give the base it was trained on")


def test_the_place_of_a_parameter(bases: dict[str, Path]) -> None:
    places = Places(open_base(bases["tied"]))
    found = places.find("lm_head.weight")
    assert isinstance(found, Place) and found.tensor == "model.embed_tokens.weight"
    assert set(found.parameters) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert isinstance(places.find("lm_head.bias"), str)
    assert [type(module).__name__ for module in places.vocabularies()] == ["Embedding", "Linear"]


def test_the_class_that_a_config_names(tmp_path: Path, bases: dict[str, Path]) -> None:
    assert type(build_named(bases["qwen3_5"], torch.float32)).__name__ == "Qwen3_5ForConditionalGeneration"
    refused(lambda: build_named(tmp_path, torch.float32), "cannot read its config.json")
    places = Places(open_base(bases["qwen3_5"]))
    assert type(places.model).__name__ == "Qwen3_5ForCausalLM"
    assert isinstance(places.find("model.layers.0.mlp.up_proj.weight"), Place) and len(places.vocabularies()) == 2
