"""The class that config.json names: found, and asked which tensors it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmq.checkpoint.source import FolderSource
from llmq.discovery import blocks as discover
from llmq.discovery.named import Named, Refused, build_as, class_of, named
from tests.llmq import classes
from tests.llmq.refusal import refused


def of(model: Path) -> Named | None:
    source = FolderSource(model)
    return named(model, discover.build(model, torch.float32), source.names())


def renamed(model: Path, out: Path, architectures: list[str] | None) -> Path:
    """The model's config with other architectures, and its weights by a link."""
    out.mkdir()
    config = json.loads((model / "config.json").read_text()) | {"architectures": architectures}
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").symlink_to(model / "model.safetensors")
    return out


def test_the_models_own_class_is_no_other(tiny_model: Path) -> None:
    assert of(tiny_model) is None


@pytest.mark.parametrize("names", [None, [], ["MyOwnModel"], ["AutoConfig"], ["logging"]])
def test_what_transformers_does_not_have_is_none(names: list[str] | None, tiny_model: Path, tmp_path: Path) -> None:
    assert of(renamed(tiny_model, tmp_path / "m", names)) is None


def test_another_class_and_what_it_loads(tiny_model: Path, tmp_path: Path) -> None:
    other = of(renamed(tiny_model, tmp_path / "m", ["Unknown", "LlamaForSequenceClassification"]))
    assert other is not None and other.name == "LlamaForSequenceClassification"
    assert other.parameters["model.norm.weight"] == "model.norm.weight" and "lm_head.weight" not in other.parameters
    source = FolderSource(tiny_model)
    tensors = {name: (source.info(name).dtype, source.info(name).shape) for name in source.names()}
    assert other.refused(tensors) == Refused(("score.weight",), ())
    tensors["score.weight"] = torch.float32, (2, 64)
    assert not other.refused(tensors)
    tensors["model.norm.weight"] = torch.float32, (63,)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    told = other.refused(tensors)
    assert told.missing == ("model.layers.1.mlp.up_proj.weight",) and told.mismatched == ("model.norm.weight",)


def test_a_class_that_cannot_be_built(tiny_model: Path, tmp_path: Path) -> None:
    refused(lambda: of(renamed(tiny_model, tmp_path / "m", ["BartForConditionalGeneration"])), "cannot be built")


def test_beyond_compares_weights_and_not_their_parts() -> None:
    told = Refused(("a.weight_packed", "a.weight_scale", "b.weight", "c.bias"), ("d.weight",))
    assert told.beyond(Refused(("a.weight",), ("c.bias",))) == Refused(("b.weight",), ("d.weight",))
    assert not told.beyond(told)


def test_a_class_that_is_named(tmp_path: Path) -> None:
    folder = classes.write("clip", tmp_path / "clip")
    whole = build_as(folder, "AutoModel", torch.bfloat16)
    assert type(whole).__name__ == "CLIPModel" and {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in whole.parameters()) and not whole.training
    # A class of a part reads its own part of the configuration.
    assert type(build_as(folder, "CLIPTextModel", torch.float32)).__name__ == "CLIPTextModel"
    refused(
        lambda: build_as(folder, "AutoModelForCausalLM", torch.float32), "no model of type 'clip'", "--class AutoModel"
    )


@pytest.mark.parametrize("name", ["AutoConfig", "AutoTokenizer", "BertConfig", "logging", "Nobody", "BertTokenizer"])
def test_a_name_that_opens_no_model(name: str) -> None:
    assert class_of("AutoModel") and class_of("T5EncoderModel")
    refused(lambda: class_of(name), f"--class {name!r} is no class of transformers", "AutoModelForSeq2SeqLM")


@pytest.mark.parametrize("name", ["PreTrainedModel", "BertPreTrainedModel"])
def test_a_class_that_others_are_made_from_has_no_weights(name: str, tmp_path: Path) -> None:
    folder = classes.write("bert", tmp_path / "bert")
    refused(lambda: build_as(folder, name, torch.float32), str(folder), f"--class {name} has no weights: --class Auto")


def test_a_config_that_the_class_cannot_be_built_with(tmp_path: Path) -> None:
    folder = classes.write("bert", tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 7}
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        lambda: build_as(folder, "AutoModel", torch.float32), str(folder), "--class AutoModel cannot build this model"
    )
