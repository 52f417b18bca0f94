"""GPTQ's files: each weight against the codes it was written from, by numpy; configurations of every tool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoRoundConfig, GPTQConfig

from llmq.formats.gptq import FORMATS, GPTQReader, layout_of, settings
from tests.llmq.formats.made import FILE, dense, fits, stored
from tests.llmq.refusal import refused
from tests.llmq.written import Case, gptq

ROWS, WIDTH = 32, 96
MODULE = nn.Linear(WIDTH, ROWS)


def config(**given: Any) -> GPTQConfig:
    return GPTQConfig(**({"bits": 4, "group_size": 32} | given))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("group", "zeros", "order"), [(32, False, False), (32, True, True), (-1, True, False)])
def test_a_weight_is_what_it_was_written_from(bits: int, kind: str, group: int, zeros: bool, order: bool) -> None:
    case = Case(kind, bits, group, zeros, order)
    tensors, expected = gptq(np.random.default_rng(bits), ROWS, WIDTH, case)
    reader = GPTQReader(config(bits=bits, group_size=group, desc_act=order, checkpoint_format=kind))
    layer = reader.layer("block.up", MODULE, (ROWS, WIDTH), stored(tensors))
    assert layer is not None and fits(layer.entries, tensors)
    weight = layer.read(tensors)
    assert (weight.bits, weight.in_features) == (bits, WIDTH)
    assert (weight.zero is None) == (not zeros) and (weight.order is None) == (not order)
    assert np.allclose(dense(weight), expected, rtol=1e-12)


def test_the_last_group_may_be_short() -> None:
    tensors, expected = gptq(np.random.default_rng(0), ROWS, 80, Case("gptq", 4, 32, True))
    layer = GPTQReader(config()).layer("block.up", nn.Linear(80, ROWS), (ROWS, 80), stored(tensors))
    assert layer is not None and fits(layer.entries, tensors)
    assert np.allclose(dense(layer.read(tensors)), expected)


def test_an_order_that_is_stored_is_read_and_one_that_is_named_is_needed() -> None:
    tensors, _ = gptq(np.random.default_rng(0), ROWS, WIDTH, Case("gptq"))
    without = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "g_idx"}
    plain, ordered = GPTQReader(config()), GPTQReader(config(desc_act=True))

    def needs(reader: GPTQReader, there: dict[str, torch.Tensor]) -> bool:
        layer = reader.layer("block.up", MODULE, (ROWS, WIDTH), stored(there))
        assert layer is not None
        return "g_idx" in layer.entries

    assert (needs(plain, tensors), needs(plain, without), needs(ordered, without)) == (True, False, True)


def test_an_ordinary_weight_is_none_of_gptq() -> None:
    there = stored({"weight": torch.ones(ROWS, WIDTH)})
    assert GPTQReader(config()).layer("block.up", MODULE, (ROWS, WIDTH), there) is None
    assert there["weight"].file == FILE


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({}, "a.up", (4, 32, False)),
        ({"desc_act": True}, "a.up", (4, 32, True)),
        ({"dynamic": {"+:.*up": {"bits": 8, "group_size": 64, "desc_act": True}}}, "a.up", (8, 64, True)),
        ({"dynamic": {".*up": {"bits": 8}}}, "a.up", (8, 32, False)),
        ({"dynamic": {"up": {"bits": 8}}}, "a.up", (4, 32, False)),  # matched from the start, as gptqmodel does
        ({"dynamic": {"a": {"bits": 2}, "a.up": {"bits": 8}}}, "a.up", (2, 32, False)),  # the first that matches
        ({"extra_config": {"a.up": {"bits": 2}}}, "a.up", (2, 32, False)),
        ({"extra_config": {"a.*": {"bits": 2}}}, "a.up", (2, 32, False)),
        ({"extra_config": {"a": {"bits": 2}}}, "a.up", (4, 32, False)),  # matched as a whole, as auto-round does
    ],
)
def test_what_is_said_of_one_module_goes_before_what_is_said_of_all(
    given: dict[str, Any], name: str, expected: tuple[int, int, bool]
) -> None:
    made = SimpleNamespace(**({"bits": 4, "group_size": 32, "desc_act": False} | given))
    assert settings(made, name) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dynamic": {"-:.*up": {}}}, ("config.json says that a.up is not quantized ('-:.*up')", "stored quantized")),
        ({"dynamic": {"+:.*up": {"bits": 5}}}, ("gives a.up 5 bits", "2, 3, 4, 8")),
        ({"dynamic": {"*": {}}}, ("dynamic has '*', no regular expression",)),
        ({"extra_config": {"(": {}}}, ("extra_config has '(', no regular expression",)),
        ({"dynamic": [1]}, ("dynamic must be an object",)),
        ({"dynamic": {"a": 3}}, ("dynamic 'a' must be an object, not 3",)),
    ],
)
def test_configurations_that_cannot_be(given: dict[str, Any], words: tuple[str, ...]) -> None:
    made = SimpleNamespace(**({"bits": 4, "group_size": 32} | given))
    refused(lambda: settings(made, "a.up"), "config.json", *words)


def test_layouts_that_are_read() -> None:
    for form, lacking in FORMATS.items():
        made = SimpleNamespace(bits=4, group_size=32, format=form)
        assert GPTQReader.refusal(made) is None and GPTQReader(made).offset == lacking
    assert layout_of(config(checkpoint_format="gptq_v2")) == "gptq_v2"
    assert layout_of(SimpleNamespace(packing_format="auto_round:auto_gptq", format="x")) == "auto_round:auto_gptq"
    assert layout_of(AutoRoundConfig(bits=4, group_size=32)) in FORMATS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"format": "marlin"}, "stored as 'marlin'"),
        ({"bits": 5}, "it has 5 bits"),
        ({"data_type": "mx_fp"}, "its values are mx_fp, not integers"),
        ({"act_bits": 8}, "its activations have 8 bits"),
    ],
)
def test_checkpoints_that_are_left_to_stock_transformers(given: dict[str, Any], words: str) -> None:
    made = SimpleNamespace(**({"bits": 4, "group_size": 32, "format": "gptq"} | given))
    assert words in (GPTQReader.refusal(made) or "")
