"""What only the class in config.json loads: described as left alone, and refused if that class would not find it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmq import job
from llmq.checkpoint.source import FolderSource
from llmq.checkpoint.tensors import TensorInfo
from llmq.discovery.named import Named
from llmq.grids.scheme import Scheme
from llmq.planning.named_class import check_named_class
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from tests.llmq import classes
from tests.llmq.formats import published
from tests.llmq.refusal import refused

IDS = torch.arange(64).view(2, 32)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SIZES | {"vocab_size": 256, "max_position_embeddings": 128, "is_decoder": True}


def classifier(folder: Path) -> Path:
    """A classifier whose base has a tied head: the causal class opens it, without its own head."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=256, tie_word_embeddings=True)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def planned(model: Path, *methods: str, **more: Any) -> Plan:
    return job.plan(str(model), Recipe(methods=methods or ("rtn",), **({"scheme": Scheme(4, 32)} | more)), ids=IDS)


def test_the_other_heads_weight_is_left_alone_by_name(tmp_path: Path) -> None:
    made = planned(classifier(tmp_path / "m"))
    section = job.config(made)["quantization_config"]
    assert "score" in section["ignore"] and made.named is not None
    (item,) = [item for item in made.weights if item.name == "score"]
    assert str(item.reason) == "only LlamaForSequenceClassification loads it: it is copied unchanged"


def test_a_section_that_the_class_would_misread_is_refused(tmp_path: Path) -> None:
    made = planned(classifier(tmp_path / "m"))
    section = job.config(made)["quantization_config"]
    check_named_class(made, section)
    (group,) = section["config_groups"].values()
    every = {"config_groups": {"group_0": group | {"targets": ["Linear"]}}, "ignore": ["lm_head"]}
    refused(
        lambda: check_named_class(made, section | every),
        "LlamaForSequenceClassification, which config.json names, would not load",
        "score.weight",
    )


def test_a_loader_that_reads_values_is_asked_for_names(tmp_path: Path) -> None:
    """bitsandbytes: which modules it takes as quantized, and whether all others are there."""
    made = planned(classifier(tmp_path / "m"), scheme=Scheme(4, 64, True, "nf4"))
    assert not [warning for warning in made.warnings if "config.json names" in warning]
    section = job.config(made)["quantization_config"]
    left = section["llm_int8_skip_modules"]
    check_named_class(made, section)
    quantized = next(item.name for item in made.weights if item.scheme is not None)
    for skipped, parameter in (
        ([name for name in left if name != "score"], "score.weight"),
        ([*left, quantized], f"{quantized}.weight"),
    ):
        refused(
            lambda skipped=skipped: check_named_class(made, section | {"llm_int8_skip_modules": skipped}),  # type: ignore[misc]
            "LlamaForSequenceClassification, which config.json names, would not load 1 parameters",
            parameter,
        )


@pytest.mark.parametrize("what", ["score.weight", ".absmax"])
def test_tensors_that_are_missing_in_what_was_written_in_nf4(tmp_path: Path, what: str) -> None:
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 64, True, "nf4"))
    made = job.plan(str(classifier(tmp_path / "m")), recipe, ids=IDS)
    job.quantize(str(tmp_path / "m"), tmp_path / "q", recipe, ids=IDS)
    written = FolderSource(tmp_path / "q", quantized_ok=True)
    infos = {name: written.info(name) for name in written.names()}
    section = job.config(made)["quantization_config"]
    check_named_class(made, section, stub(infos))
    lost = next(name for name in infos if name.endswith(what))
    refused(lambda: check_named_class(made, section, stub({n: i for n, i in infos.items() if n != lost})), lost)
    if what == "score.weight":
        other = {**infos, lost: replace(infos[lost], shape=(3, 64))}
        refused(lambda: check_named_class(made, section, stub(other)), lost)


def stub(infos: dict[str, TensorInfo]) -> Any:
    """A sink with these tensors."""
    return SimpleNamespace(done=["all"], infos=lambda unit: infos)


def test_tensors_that_no_class_of_transformers_loads_are_left_alone_by_name(tiny_model: Path, tmp_path: Path) -> None:
    """Heads for multi-token prediction: a server loads them, by the checkpoint's names."""
    from safetensors.torch import load_file, save_file

    (tmp_path / "m").mkdir()
    tensors = load_file(tiny_model / "model.safetensors") | {
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(128, 64),
        "mtp.fc.weight": torch.ones(64, 128),
        "mtp.norm.weight": torch.ones(64),
    }
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text((tiny_model / "config.json").read_text())
    for recipe in ({}, {"scheme": Scheme(4, 64, True, "nf4")}):
        section = job.config(planned(tmp_path / "m", **recipe))["quantization_config"]
        left = section.get("ignore", section.get("llm_int8_skip_modules"))
        assert {"mtp.layers.0.mlp.up_proj", "mtp.fc", "lm_head"} <= set(left) and "mtp.norm" not in left


def test_a_source_that_lacks_the_classs_weights_itself_is_warned_of(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    made = planned(tmp_path / "m")
    assert [w for w in made.warnings if "score.weight" in w and "already" in w]


def test_the_section_of_a_dequantized_source_says_nothing_of_its_tensors(tiny_model: Path, tmp_path: Path) -> None:
    """With it, the class would look for scales, and what it misses in the source is not looked for in the output."""
    copytree(tiny_model, tmp_path / "m")
    made = planned(published.in_layout("mxfp8-quantized")(tmp_path / "m"), include=("lm_head",))
    assert len(made.outside) == 1 and not [warning for warning in made.warnings if "config.json names" in warning]
    named = Named(made.model, made.source.names())
    infos = [made.source.info(name) for name in made.source.names()]
    assert not named.refused({info.name: (info.dtype, info.shape) for info in infos})


def test_a_tied_head_of_the_class_in_config_json_is_left_alone(tmp_path: Path) -> None:
    """The class that --class names has no head; bitsandbytes' loader would take the other's for a quantized one."""
    from transformers import BartConfig, BartForConditionalGeneration

    BartForConditionalGeneration(BartConfig(**classes.BART)).save_pretrained(tmp_path / "m")
    made = planned(tmp_path / "m", scheme=Scheme(4, 64, True, "nf4"), model_class="AutoModel")
    section = job.config(made)["quantization_config"]
    assert section["llm_int8_skip_modules"] == ["lm_head"]
    check_named_class(made, section)


def test_a_named_class_that_cannot_be_built_is_warned_of(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = json.loads((tiny_model / "config.json").read_text()) | {"architectures": ["BartForConditionalGeneration"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    assert [w for w in planned(tmp_path / "m").warnings if "BartForConditionalGeneration" in w]


def vision(folder: Path) -> type:
    """Qwen3.5: its causal class is the text half only."""
    import transformers

    text = {"vocab_size": 256, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
    linear = {f"linear_{part}": 32 for part in ("key_head_dim", "value_head_dim")}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
    tower |= {"num_position_embeddings": 64, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = transformers.Qwen3_5Config(
        text_config=SIZES | text | linear | heads | {"num_hidden_layers": 4, "rope_parameters": rope},
        vision_config=tower,
        tie_word_embeddings=False,
        **{f"{name}_token_id": 200 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
    )
    return saved(folder, transformers.Qwen3_5ForConditionalGeneration, config)


def saved(folder: Path, kind: Any, config: Any) -> type:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return kind  # type: ignore[no-any-return]


def classification(folder: Path) -> type:
    from transformers import LlamaForSequenceClassification

    classifier(folder)
    return LlamaForSequenceClassification


def bert(name: str, task: str = "PreTraining", **more: Any) -> Callable[[Path], type]:
    return lambda folder: of_name(folder, f"{name}For{task}", f"{name}Config", BERT | more)


def encoder_decoder(name: str, sizes: dict[str, Any]) -> Callable[[Path], type]:
    tokens = {"vocab_size": 256, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return lambda folder: of_name(folder, f"{name}ForConditionalGeneration", f"{name}Config", tokens | sizes)


def of_name(folder: Path, kind: str, config: str, sizes: dict[str, Any]) -> type:
    import transformers

    return saved(folder, getattr(transformers, kind), getattr(transformers, config)(**sizes))


WHISPER = {"d_model": 64, "max_source_positions": 40, "max_target_positions": 64, "num_mel_bins": 8}
WHISPER |= {f"{half}_{part}": n for half in ("encoder", "decoder") for part, n in (("layers", 2), ("ffn_dim", 128))}
PROPHET = {"hidden_size": 64, "max_position_embeddings": 128, "ngram": 2}
PROPHET |= {f"num_{half}_layers": 2 for half in ("encoder", "decoder")}
PROPHET |= {f"{half}_ffn_dim": 128 for half in ("encoder", "decoder")}
PROPHET |= {f"num_{half}_attention_heads": 4 for half in ("encoder", "decoder")}
WHISPER |= {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
KINDS = {
    "qwen3.5": vision,
    "classifier": classification,
    "bert": bert("Bert"),
    "bert-masked": bert("Bert", "MaskedLM"),
    "megatron": bert("MegatronBert"),
    "ernie": bert("Ernie"),
    "roc": bert("RoCBert"),
    "bigbird": bert("BigBird", attention_type="original_full"),
    "whisper": encoder_decoder("Whisper", WHISPER),
    "prophetnet": encoder_decoder("ProphetNet", PROPHET),
}


# Models made like BERT differ in names, which is seen in one format: bitsandbytes' is tried on BERT's own classes.
NF4 = Scheme(4, 64, True, "nf4")
CASES = [(kind, Scheme(4, 32)) for kind in KINDS]
CASES += [(kind, NF4) for kind in KINDS if kind not in ("megatron", "ernie", "roc")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), CASES, ids=str)
def test_every_other_parameter_is_the_sources_through_the_named_class(
    kind: str, scheme: Scheme, tmp_path: Path
) -> None:
    """Stock `from_pretrained` of the class that config.json names: nothing missing, the rest bit for bit."""
    stock: Any = KINDS[kind](tmp_path / "m")
    report = job.quantize(str(tmp_path / "m"), tmp_path / "q", Recipe(methods=("rtn",), scheme=scheme), ids=IDS)
    model, told = stock.from_pretrained(tmp_path / "q", output_loading_info=True, dtype=torch.float32)
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]
    before, after = dict(stock.from_pretrained(tmp_path / "m").named_parameters()), dict(model.named_parameters())
    changed = {n for n, v in before.items() if n not in after or not torch.equal(after[n], v)}
    assert len(changed) == len(report.quantized) > 0
    assert len(before) > len(changed)
