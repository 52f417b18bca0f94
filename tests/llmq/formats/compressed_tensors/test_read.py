"""compressed-tensors' integers read for kernels: each weight against the codes it was written from, by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CompressedTensorsConfig

from llmq.formats.compressed_tensors.read import CompressedTensorsReader, EightBitLayer, PackedLayer
from llmq.formats.plain import Float8Weight, Int8Weight, IntWeight
from tests.llmq.formats.made import FILE, dense, fits, stored
from tests.llmq.refusal import refused
from tests.llmq.written import Case, compressed
from tests.llmq.written import config as section_of

ROWS, WIDTH = 32, 96
MODULE = nn.Linear(WIDTH, ROWS)
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT8 = INT8 | {"type": "float"}
TOKEN = INT8 | {"strategy": "token", "dynamic": True}


def config(case: Case, inputs: dict[str, Any] | None = None, **changes: Any) -> CompressedTensorsConfig:
    """transformers' own reading of a folder's section, without what newer packages refuse: the order by groups."""
    section = section_of(case)
    section["config_groups"]["group_0"]["weights"] |= {"actorder": None} | changes
    section["config_groups"]["group_0"]["input_activations"] = inputs
    return CompressedTensorsConfig(**{k: v for k, v in section.items() if k != "quant_method"})


def layer_of(reader: CompressedTensorsReader, tensors: dict[str, Tensor]) -> Any:
    return reader.layer("block.up", MODULE, (ROWS, WIDTH), stored(tensors))


def drawn(case: Case) -> tuple[dict[str, Tensor], np.ndarray]:
    return compressed(np.random.default_rng(case.bits), ROWS, WIDTH, case)


CASES = [
    *(Case("ct", bits, 32, zeros) for bits in (2, 3, 4, 5, 6, 7, 8) for zeros in (False, True)),
    Case("ct", 4, -1, True),
    Case("ct", 4, 32, False, True),
    Case("ct", 8, 32, True, True),
    Case("ct-int8", 8, 32),
    Case("ct-int8", 8, -1, True),
    Case("ct-tensor", 4, -1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_is_what_it_was_written_from(case: Case) -> None:
    tensors, expected = drawn(case)
    layer = layer_of(CompressedTensorsReader(config(case)), tensors)
    assert isinstance(layer, PackedLayer) and fits(layer.entries, tensors)
    weight = layer.read(tensors)
    assert isinstance(weight, IntWeight) and weight.scale.shape == (ROWS, -(-WIDTH // weight.group_size))
    assert weight.bits == (case.bits if case.bits in (2, 3, 4, 8) else 8)
    assert (weight.order is None) == (not case.order) and (weight.zero is None) == (not case.zeros)
    assert np.allclose(dense(weight), expected, rtol=1e-12)


@pytest.mark.parametrize("static", [None, (1,), ()])
def test_a_weight_that_meets_8_bit_inputs_keeps_its_codes(static: tuple[int, ...] | None) -> None:
    case = Case("ct-int8", 8, -1)
    tensors, expected = drawn(case)
    inputs = INT8 | ({"strategy": "token", "dynamic": True} if static is None else {"strategy": "tensor"})
    if static is not None:
        tensors["input_scale"] = torch.full(static, 0.25)
    reader = CompressedTensorsReader(config(case, inputs))
    assert reader.refusal(config(case, inputs)) is None
    layer = layer_of(reader, tensors)
    assert isinstance(layer, EightBitLayer) and fits(layer.entries, tensors)
    weight = layer.read(tensors)
    assert isinstance(weight, Int8Weight)
    assert np.allclose(weight.codes.double().numpy() * weight.scale.double().numpy(), expected)
    assert weight.input_scale is None if static is None else weight.input_scale.tolist() == [0.25]


@pytest.mark.parametrize("static", [None, (1,), ()])
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_a_float8_weight_that_meets_float8_inputs_keeps_its_codes(static: tuple[int, ...] | None, form: str) -> None:
    every = torch.arange(ROWS * WIDTH).remainder(256).to(torch.uint8).view(ROWS, WIDTH)
    codes = every.masked_fill(every & 127 == 127, 0).view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.rand(ROWS, 1).bfloat16()}
    inputs = FLOAT8 | ({"strategy": "tensor"} if static is not None else {"strategy": "token", "dynamic": True})
    if static is not None:
        tensors["input_scale"] = torch.full(static, 0.25)
    whole = config(Case("ct-int8", 8, -1), inputs, type="float")
    for group in whole.quantization_config.config_groups.values():
        group.format = form
    reader = CompressedTensorsReader(whole)
    assert reader.refusal(whole) is None
    layer = layer_of(reader, tensors)
    assert isinstance(layer, EightBitLayer) and fits(layer.entries, tensors)
    weight = layer.read(tensors)
    assert isinstance(weight, Float8Weight) and torch.equal(weight.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(weight.scale, tensors["weight_scale"])
    assert weight.input_scale is None if static is None else weight.input_scale.tolist() == [0.25]
    codes.view(torch.uint8)[3, 4] = 0xFF
    refused(lambda: layer.read(tensors), "values that are not finite")


@pytest.mark.parametrize("case", [Case("ct", 4, 32), Case("ct-int8", 8, -1)], ids=str)
def test_zero_points_of_a_symmetric_weight_must_be_0(case: Case) -> None:
    """Some writers store them; one that is not 0 contradicts the configuration."""
    tensors, expected = drawn(case)
    zeros = torch.zeros(ROWS, -(-WIDTH // (WIDTH if case.group < 0 else case.group)), dtype=torch.int8)
    there = tensors | {"weight_zero_point": zeros}
    layer = layer_of(CompressedTensorsReader(config(case)), there)
    assert fits(layer.entries, there) and np.allclose(dense(layer.read(there)), expected)
    zeros[3, 0] = 1
    refused(lambda: layer.read(there), "config.json says that the weight is symmetric", "weight_zero_point")


def test_the_stored_shape_is_the_model_s() -> None:
    case = Case("ct", 4, 32)
    tensors, _ = drawn(case)
    layer = layer_of(CompressedTensorsReader(config(case)), tensors)
    refused(lambda: layer.read(tensors | {"weight_shape": torch.tensor([WIDTH, ROWS])}), "[96, 32]", "[32, 96]")


def test_an_order_of_which_all_is_negative_is_none() -> None:
    """compressed-tensors fills an order that was never set with −1."""
    case = Case("ct", 4, 32)
    tensors, expected = drawn(case)
    tensors["weight_g_idx"] = torch.full((WIDTH,), -1, dtype=torch.int32)
    weight = layer_of(CompressedTensorsReader(config(case)), tensors).read(tensors)
    assert weight.order is None and np.allclose(dense(weight), expected)


def test_files_and_configuration_that_do_not_agree_are_named() -> None:
    case = Case("ct", 4, 32)
    tensors, _ = drawn(case)
    reader = CompressedTensorsReader(config(case))
    left = stored(tensors, "lm_head")
    refused(
        lambda: reader.layer("lm_head", MODULE, (ROWS, WIDTH), left),
        str(FILE),
        "config.json says that lm_head is not quantized",
    )
    assert reader.layer("lm_head", MODULE, (ROWS, WIDTH), stored({"weight": torch.ones(ROWS, WIDTH)})) is None
    plain = {"weight": torch.ones(ROWS, WIDTH)}
    refused(lambda: layer_of(reader, plain), str(FILE), "block.up is quantized", "an ordinary float32 tensor")
    assert layer_of(reader, {"bias": torch.ones(ROWS)}) is None


@pytest.mark.parametrize(
    ("case", "inputs", "changes", "words"),
    [
        (Case("ct"), None, {"type": "float"}, "not float8 with a scale per channel"),
        (Case("ct-int8", 8, -1), None, {"type": "float"}, "it does not round activations"),
        (Case("ct-int8", 8, 32), FLOAT8 | {"strategy": "token", "dynamic": True}, {"type": "float"}, "not float8 with"),
        (Case("ct-int8", 8, -1), TOKEN, {"type": "float"}, "but not to float8"),
        (Case("ct"), None, {"strategy": "channel", "group_size": None, "num_bits": 1}, "its weights have 1 bits"),
        (
            Case("ct-int8", 8, -1),
            TOKEN | {"num_bits": 4},
            {},
            "but not to symmetric int8",
        ),
        (
            Case("ct-int8", 8, -1),
            TOKEN | {"symmetric": False},
            {},
            "but not to symmetric int8",
        ),
        (Case("ct", 8, -1), TOKEN, {}, "its weights are not symmetric int8"),
        (Case("ct-int8", 8, 32), TOKEN, {}, "not symmetric int8 with a scale"),
    ],
)
def test_checkpoints_that_are_left_to_stock_transformers(
    case: Case, inputs: dict[str, Any] | None, changes: dict[str, Any], words: str
) -> None:
    assert words in (CompressedTensorsReader.refusal(config(case, inputs, **changes)) or "")


def test_the_rest_of_a_configuration_is_looked_at_too() -> None:
    assert CompressedTensorsReader.refusal(config(Case("ct"))) is None
    dequantized = CompressedTensorsConfig(**{k: v for k, v in section_of(Case("ct")).items() if k != "quant_method"})
    dequantized.dequantize = True
    assert "dense weights" in (CompressedTensorsReader.refusal(dequantized) or "")
    other = config(Case("ct"))
    other.quantization_config.format = "marlin-24"
    other.quantization_config.config_groups["group_0"].format = None
    assert "stored as marlin-24" in (CompressedTensorsReader.refusal(other) or "")
    frozen = config(Case("ct"))
    frozen.quantization_config.quantization_status = "frozen"
    assert "not stored quantized" in (CompressedTensorsReader.refusal(frozen) or "")
