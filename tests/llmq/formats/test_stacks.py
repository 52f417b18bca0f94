"""The names and the mark of experts that only llmq reads."""

from __future__ import annotations

import pytest
import torch

from llmq import formats
from llmq.formats.stacks import marked, parse, stem, unmarked
from llmq.grids.scheme import Scheme


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "w1", "down_proj"])
def test_a_name_says_parameter_expert_and_order(parameter: str, transposed: bool) -> None:
    name = stem("model.layers.3.mlp.experts", parameter, 12, transposed)
    assert parse(name) == (f"model.layers.3.mlp.experts.{parameter}", 12, transposed)


@pytest.mark.parametrize("name", ["lm_head", "model.layers.3.self_attn.q_proj", "model.embed_tokens"])
def test_ordinary_names_are_no_parameters_entries(name: str) -> None:
    found = parse(name)
    assert found is None or found[0] != name  # a block's number looks like an expert's: the model says what it is


def test_every_format_is_marked_and_the_mark_is_taken_off() -> None:
    section = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {"targets": ["a"], "format": "pack-quantized"},
            "group_1": {"targets": ["b"], "format": "int-quantized"},
        },
    }
    made = marked(section)
    assert made["format"] == "llmq-mixed-precision"
    assert [group["format"] for group in made["config_groups"].values()] == [
        "llmq-pack-quantized",
        "llmq-int-quantized",
    ]
    assert unmarked(made) == (section, True)
    assert unmarked(section) == (section, False)


def test_configurations_of_others_are_left_alone() -> None:
    for section in ({}, {"format": None}, {"format": "pack-quantized", "config_groups": {"x": ["Linear"]}}):
        assert unmarked(section) == (section, False)
    assert unmarked({"format": "llmq-x", "config_groups": {"x": ["Linear"]}})[0]["config_groups"] == {"x": ["Linear"]}


def test_compressed_tensors_refuses_the_mark() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    section = formats.config({Scheme(4, 32): ["a"]}, [], torch.float32)
    keys = {"quant_method", "format", "config_groups"}
    plain, mark = ({k: v for k, v in made.items() if k in keys} for made in (section, marked(section)))
    quantization.QuantizationConfig(**plain)
    with pytest.raises(ValueError, match="format"):
        quantization.QuantizationConfig(**mark)
