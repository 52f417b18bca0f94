"""Which class opens a checkpoint, and what a config.json says that is no model that generates text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from llmq import job
from llmq.discovery.architecture import beside_decoder, generator, in_towers, not_causal, opener, suggested
from llmq.errors import LlmqError

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "it is BertModel"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration, which is no",
        ),
        ({"model_type": "clip"}, "type 'clip' is no causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "--class AutoModelForSequenceC"),
        ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}, "part of a diffusion pipeline"),
        ({"model_type": "llava", "architectures": ["LlavaModel"]}, "it is LlavaModel"),
        ({"model_type": "llava"}, "type 'llava' is no causal language model"),  # nothing says which class
        ({"model_type": "pi0", "architectures": ["PI0ForConditionalGeneration"]}, "which generates no text"),
        (
            {
                "model_type": "florence2",
                "architectures": ["Florence2ForConditionalGeneration"],
                "is_encoder_decoder": True,
            },
            "has an encoder before its decoder",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}},
            "by AutoModel only, and llmq calibrates and measures models that generate text only: --class AutoModel ",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "no model_type"),
        ({}, "no model_type"),
        ({"model_type": "of-tomorrow", "architectures": ["OfTomorrowForCausalLM"]}, "pip install -U transformers"),
    ],
)
def test_what_it_is_instead(config: dict[str, Any], words: str) -> None:
    assert words in (not_causal(config) or "")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama"},  # who made it did not say
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
        {"model_type": "voxtral", "architectures": ["VoxtralForConditionalGeneration"]},
        {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}},
    ],
)
def test_those_that_generate_text(config: dict[str, Any]) -> None:
    assert not_causal(config) is None


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.LlamaConfig(), "AutoModelForCausalLM"),
        (transformers.Qwen3_5Config(architectures=["Qwen3_5ForConditionalGeneration"]), "AutoModelForCausalLM"),
        (transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"]), "LlavaForConditionalGeneration"),
        (
            transformers.VoxtralConfig(architectures=["Of", "VoxtralForConditionalGeneration"]),
            "VoxtralForConditionalGeneration",
        ),
        # Neither generates text: the causal class says so.
        (transformers.LlavaConfig(architectures=["LlavaModel"]), "AutoModelForCausalLM"),
        (transformers.LlavaConfig(), "AutoModelForCausalLM"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "AutoModelForCausalLM"),
        # An encoder stands before its decoder.
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "AutoModelForCausalLM"),
        (transformers.PreTrainedConfig(auto_map={"AutoModelForCausalLM": "own.Own"}), "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_opens_a_checkpoint(config: Any, kind: str) -> None:
    assert generator(config).__name__ == kind


@pytest.mark.parametrize(
    ("classes", "kind"),
    [
        (("AutoConfig", "AutoModel", "AutoModelForMaskedLM"), "AutoModel"),
        (("AutoTokenizer", "AutoModelForMaskedLM"), "AutoModelForMaskedLM"),
        (("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "AutoModelForCausalLM"),
        (("AutoConfig",), "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_opens_all_of_a_folder_with_code_of_its_own(classes: tuple[str, ...], kind: str) -> None:
    config = transformers.PreTrainedConfig(auto_map=dict.fromkeys(classes, "own.Own"))
    assert opener(config).__name__ == kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), "BertModel"),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL)), "LlamaModel"),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**{**SMALL, "image_size": 32})), "ViTModel"),
        (
            lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, pad_token_id=0)),
            "LlamaForSequenceClassification",
        ),
    ],
)
def test_a_plan_says_so(tmp_path: Path, make: Any, words: str) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(LlmqError) as caught:
        job.plan(str(tmp_path))
    message = str(caught.value)
    assert words in message and "no causal language model" in message and "\n" not in message


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_told_by_its_names(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(LlmqError, match=r"it has layers\.0\.attention\.wq\.weight, for example.*download"):
        job.plan(str(tmp_path))


def test_a_tower_is_beside_a_text_model_and_a_head_is_none() -> None:
    """A BERT has a layer between its decoder and its output embedding, and is of text alone."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llava = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model"} | vision, text_config={"model_type": "llama"} | SMALL
    )
    bert = transformers.BertConfig(**SMALL, is_decoder=True)
    with torch.device("meta"):
        seeing, reading = transformers.LlavaForConditionalGeneration(llava), transformers.BertLMHeadModel(bert)
    assert beside_decoder(reading) and not in_towers(reading)
    found = in_towers(seeing)
    assert found == beside_decoder(seeing) and all("vision_tower" in n or "projector" in n for n in found)
    assert len(found) == 8


@pytest.mark.parametrize(
    ("kind", "named", "name"),
    [
        ("bert", ["BertModel"], "AutoModel"),
        ("bert", ["BertForMaskedLM"], "AutoModelForMaskedLM"),
        ("bert", None, "AutoModel"),
        ("t5", ["T5ForConditionalGeneration"], "AutoModelForSeq2SeqLM"),
        ("whisper", ["WhisperForConditionalGeneration"], "AutoModelForSpeechSeq2Seq"),
        ("clip", ["CLIPTextModel"], "CLIPTextModel"),
        ("bert", ["OfTomorrow"], None),
        ("of-tomorrow", None, None),
    ],
)
def test_the_class_to_open_it_with(kind: str, named: list[str] | None, name: str | None) -> None:
    config = {"model_type": kind, "architectures": named}
    assert suggested(config) == name
    if name is not None and named is not None:
        assert f"--class {name} --method rtn" in (not_causal(config) or "")


def test_of_an_encoder_and_a_decoder_one_that_is_for_both() -> None:
    named = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}
    assert suggested(named) == "AutoModelForSeq2SeqLM"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "T5ForConditionalGeneration"),
        (transformers.LlamaConfig(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
        (
            transformers.Qwen3_5Config(architectures=["Qwen3_5ForConditionalGeneration"]),
            "Qwen3_5ForConditionalGeneration",
        ),
        (transformers.BertConfig(architectures=["OfTomorrow"]), "AutoModelForCausalLM"),
    ],
)
def test_what_opens_any_checkpoint(config: Any, kind: str) -> None:
    assert opener(config).__name__ == kind
