"""What is included outside the decoder's blocks, by name and by make, without calibration; what is left, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq import job
from llmq.discovery.reasons import Kind
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.plan import Plan
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe
from tests.conftest import newer_transformers, write_tiny_model
from tests.llmq import classes
from tests.llmq.planning.made import IDS, make
from tests.llmq.refusal import refused
from tests.llmq.vision import write_llava

TOWER = "vision_tower.encoder.layers"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_llava(tmp_path_factory.mktemp("outside") / "llava", tiny_model)


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a layer for multi-token prediction, which its class does not load."""
    folder = tmp_path_factory.mktemp("outside") / "mtp"
    return with_mtp(tiny_model, folder)


def with_mtp(model: Path, folder: Path, prefix: str = "mtp.layers.0.") -> Path:
    folder.mkdir(parents=True)
    tensors = load_file(model / "model.safetensors")
    last = {name: value for name, value in tensors.items() if ".layers.2." in name}
    tensors |= {name.replace("model.layers.2.", prefix): value + 0.01 for name, value in last.items()}
    tensors |= {
        f"{prefix}eh_proj.weight": torch.ones(64, 128),
        f"{prefix}mlp.wide.up_proj.weight": torch.ones(32, 64),
        f"{prefix}embed_tokens.weight": torch.ones(256, 64),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((model / "config.json").read_text())
    return folder


def outside(plan: Plan) -> dict[str, WeightPlan]:
    return {item.name: item for item in plan.weights if item.block is None}


def included(plan: Plan) -> set[str]:
    return {name for name, item in outside(plan).items() if item.scheme is not None}


def opened(folder: Path, opener: str, **recipe: Any) -> Plan:
    return job.plan(
        str(folder), Recipe(**{"methods": ("rtn",), "scheme": Scheme(4, 32), "model_class": opener} | recipe)
    )


def test_nothing_is_included_unasked(seeing: Path) -> None:
    plan = make(seeing)
    assert not plan.outside and included(plan) == set()
    assert {str(item.reason) for item in outside(plan).values()} == {"outside the decoder blocks"}


def test_a_towers_linear_weights_and_nothing_else(seeing: Path) -> None:
    plan = make(seeing, include=("vision_tower",))
    layers = {f"{TOWER}.{i}.{part}" for i in (0, 1) for part in ("mlp.fc1", "mlp.fc2", "self_attn.out_proj")}
    layers |= {f"{TOWER}.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkv"}
    assert included(plan) == layers == {item.name for item in plan.outside.values()}
    items = outside(plan)
    assert all(items[name].scheme == Scheme(4, 32) and items[name].reason is None for name in layers)
    left = items["vision_tower.embeddings.patch_embedding"]
    assert left.reason and left.reason.kind is Kind.NOT_LINEAR and "Conv2d" in str(left.reason)
    assert str(items["multi_modal_projector.linear_1"].reason) == "outside the decoder blocks"
    section = job.config(plan)["quantization_config"]
    assert not layers & {*section["ignore"]} and "multi_modal_projector.linear_1" in section["ignore"]


def test_overrides_kept_and_ragged_ones(seeing: Path) -> None:
    plan = make(
        seeing,
        group=64,
        include=("vision_tower",),
        overrides=(("fc1", Scheme(8, 32)),),
        keep=("v_proj",),
        ragged="channel",
        loader="transformers",
    )
    items = outside(plan)
    assert items[f"{TOWER}.0.mlp.fc1"].scheme == Scheme(8, 32)
    assert items[f"{TOWER}.0.mlp.fc2"].scheme == Scheme(4, 64)
    assert items[f"{TOWER}.0.self_attn.q_proj"].scheme == Scheme(4, None)  # 32 wide
    assert items[f"{TOWER}.0.self_attn.v_proj"].by_user
    refused(lambda: make(seeing, group=64, include=("vision_tower",)), "does not divide the width of", f"{TOWER}.0.")


def test_the_output_embedding_is_a_target_by_name(tiny_model: Path) -> None:
    plan = make(tiny_model, include=("lm_head",))
    assert included(plan) == {"lm_head"}
    section = job.config(plan)["quantization_config"]
    assert section["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"] and section["ignore"] == []


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("visual.*", ("matches no weight", "outside the decoder's blocks a name looks like")),
        ("self_attn", ("only weights of the decoder's blocks", "quantized without it")),
        ("re:(", ("is not a regular expression",)),
        ("embed_tokens", ("no weight that can be quantized", "Embedding")),
    ],
)
def test_patterns_that_include_nothing(tiny_model: Path, pattern: str, words: tuple[str, ...]) -> None:
    refused(lambda: make(tiny_model, include=(pattern,)), f"--include {pattern!r}", *words)


def test_the_reason_is_that_of_most_weights(tmp_path: Path, tiny_model: Path) -> None:
    """A tower whose initialization reads every linear weight also has one convolution, which comes first."""
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    text = AutoModelForCausalLM.from_pretrained(tiny_model).config
    vision = SiglipVisionConfig(**classes.VISION)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path)
    refused(
        lambda: make(tmp_path, include=("vision_tower",)),
        "self_attn.k_proj: stock transformers cannot load it packed: the model's own code accesses it while loading",
    )


def test_a_tied_output_embedding_is_not_included(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = classes.SMALL | {"vocab_size": 256, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    refused(
        lambda: make(tmp_path, include=("lm_head",)), "only lm_head.weight", "is shared with model.embed_tokens.weight"
    )


def test_static_scales_need_calibration(seeing: Path) -> None:
    static = {"scheme": Scheme(8, None, activations=Activations(dynamic=False)), "include": ("vision_tower",)}

    def plan(**more: Any) -> Plan:
        return job.plan(str(seeing), Recipe(methods=("rtn",), **static | more), ids=IDS)

    refused(plan, f"{TOWER}.0.self_attn.k_proj: static scales", "--activations dynamic")
    dynamic = Scheme(8, None, activations=Activations())
    assert len(plan(overrides=(("vision_tower", dynamic),)).outside) == 12


def test_a_layer_that_no_class_loads_is_known_by_its_make(predicting: Path) -> None:
    """The same name within its block, and the same shape, as a quantized weight of a block."""
    plan = make(predicting, include=("mtp",))
    parts = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert included(plan) == {f"mtp.layers.0.{part}" for part in parts}
    left = {name: str(item.reason) for name, item in outside(plan).items() if name.startswith("mtp") and item.reason}
    # Another shape under a known name, and names that no block has.
    assert left.keys() == {f"mtp.layers.0.{part}" for part in ("eh_proj", "mlp.wide.up_proj", "embed_tokens")}
    assert all("no quantized weight of a block has its name and shape" in reason for reason in left.values())
    assert left.keys() <= {*job.config(plan)["quantization_config"]["ignore"]}
    assert [warning for warning in plan.warnings if "no class of transformers loads them" in warning]
    # What a block leaves alone is no model for others.
    kept = make(predicting, include=("mtp",), keep=("re:^model.*v_proj",), loader="transformers")
    assert "mtp.layers.0.self_attn.v_proj" not in included(kept)


def test_layers_that_no_class_loads_are_ignored_by_default(predicting: Path) -> None:
    plan = make(predicting)
    ignored = {*job.config(plan)["quantization_config"]["ignore"]}
    assert {name for name in outside(plan) if name.startswith("mtp")} <= ignored
    assert not [warning for warning in plan.warnings if "no class" in warning]


def test_few_outputs_and_layers_of_other_classes(tmp_path: Path) -> None:
    labels = outside(opened(classes.write("bert-labels", tmp_path / "l"), "AutoModelForSequenceClassification"))
    assert "fewer than 16 outputs" in str(labels["classifier"].reason)
    siglip = outside(opened(classes.write("siglip", tmp_path / "s"), "AutoModel"))
    # torch's MultiheadAttention reads the weight of its linear layer itself.
    assert "NonDynamicallyQuantizableLinear" in str(siglip["vision_model.head.attention.out_proj"].reason)
    assert siglip["vision_model.head.mlp.fc1"].scheme == Scheme(4, 32)


def test_a_class_includes_all_but_its_output_embedding(tmp_path: Path) -> None:
    folder = classes.write("bart-untied", tmp_path)
    plan = opened(folder, "AutoModelForSeq2SeqLM")
    assert len(plan.outside) == 32 and not plan.blocks
    assert "output embedding" in str(outside(plan)["lm_head"].reason)
    assert {str(item.reason) for name, item in outside(plan).items() if "shared" in name} == {
        "it is the weight of BartScaledWordEmbedding, and only plain linear layers are loaded packed"
    }
    assert len(opened(folder, "AutoModelForSeq2SeqLM", include=("lm_head",)).outside) == 33
    refused(lambda: opened(folder, "AutoModelForSeq2SeqLM", methods=("gptq",)), "'gptq' is calibrated", "--method rtn")
    refused(lambda: opened(folder, "AutoModelForSeq2SeqLM", methods=("awq",)), "'awq' is calibrated", "--method hqq")


def test_a_class_without_the_checkpoints_weights_is_refused_with_a_better_one(tmp_path: Path) -> None:
    folder = classes.write("bert-masked", tmp_path)
    refused(lambda: opened(folder, "AutoModel"), "pooler.dense.weight", "--class AutoModelForMaskedLM")
    refused(lambda: opened(folder, "AutoModelForSeq2SeqLM"), "no model of type 'bert'", "--class AutoModelForMaskedLM")
    refused(lambda: opened(folder, "OfTomorrow"), "--class 'OfTomorrow' is no class of transformers")


def test_parameters_that_are_made_while_loading_need_no_tensor(tmp_path: Path) -> None:
    """Marian's positions are computed; its own class says so."""
    items = outside(opened(classes.write("marian", tmp_path), "AutoModelForSeq2SeqLM"))
    assert "no tensor" in str(items["model.encoder.embed_positions"].reason)


@newer_transformers
def test_one_scheme_is_unpacked_while_loading(tmp_path: Path) -> None:
    """T5's initialization reads weights, which packed modules do not have; and `generate` calls the encoder alone."""
    folder = classes.write("t5", tmp_path)
    plan = opened(folder, "AutoModelForSeq2SeqLM")
    assert job.config(plan)["quantization_config"]["dequantize"] is True and not plan.warnings
    bart = classes.write("bart", tmp_path / "bart")
    two = opened(bart, "AutoModelForSeq2SeqLM", overrides=(("fc1", Scheme(8, 32)),))
    assert "dequantize" not in job.config(two)["quantization_config"]
    assert [warning for warning in two.warnings if "when the whole model is called first" in warning]
    rounded = {"scheme": Scheme(8, None, activations=Activations())}
    refused(lambda: opened(folder, "AutoModelForSeq2SeqLM", **rounded), "nothing to quantize", "while loading")


@pytest.mark.slow
def test_what_a_loader_never_packs_is_left_alone(tmp_path: Path) -> None:
    """bitsandbytes' loader keeps in float32 what the model's class says."""
    folder = classes.write("t5", tmp_path)
    items = outside(opened(folder, "AutoModelForSeq2SeqLM", methods=("nf4",), scheme=Scheme(4, 64, True, "nf4")))
    left = {name for name, item in items.items() if "never packs it" in str(item.reason)}
    assert left and all(name.endswith(".wo") for name in left)
    assert any(item.scheme for item in items.values())


def test_what_only_the_named_class_loads(tmp_path: Path) -> None:
    """A classifier, opened as the model that it was made from: its head is included by name only."""
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(**classes.TEXT, num_labels=32)).save_pretrained(tmp_path)
    items = outside(opened(tmp_path, "AutoModel"))
    assert str(items["classifier"].reason).startswith("only BertForSequenceClassification loads it")
    plan = opened(tmp_path, "AutoModel", include=("classifier",))
    assert outside(plan)["classifier"].scheme == Scheme(4, 32)
    assert "classifier" not in job.config(plan)["quantization_config"]["ignore"]


def test_a_ragged_width_is_no_block(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    assert config["vocab_size"] == 256
    message = refused(lambda: make(model, group=128, include=("lm_head",), keep=("re:layers",)), "lm_head [256, 64]")
    assert "in blocks" not in message
