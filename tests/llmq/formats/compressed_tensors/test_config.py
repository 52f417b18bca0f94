"""compressed-tensors' configuration: read by its own package as it is meant, one scheme by class, several by name."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors.config import config_of, dense, layout_of, loads_dense, with_targets
from llmq.grids.scheme import Activations, Scheme

W8A8 = Scheme(8, None, activations=Activations())


def test_one_scheme_is_written_as_a_class_and_several_by_name() -> None:
    one = config_of({Scheme(4, 128): ["a.x", "a.y"]}, ["head"])
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"] and one["ignore"] == ["head"]
    two = config_of({Scheme(8, None): ["a.z"], Scheme(4, 128): ["a.y", "a.x"], Scheme(3, 128): []}, ["head"])
    assert [group["targets"] for group in two["config_groups"].values()] == [["a.z"], ["a.x", "a.y"]]


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (Scheme(4, 128), "pack-quantized"),
        (Scheme(8, None), "pack-quantized"),
        (W8A8, "int-quantized"),
        (Scheme(8, None, activations=Activations(dynamic=False)), "int-quantized"),
        (Scheme(8, None, grid="fp8"), "float-quantized"),
        (Scheme(8, None, grid="fp8", activations=Activations()), "float-quantized"),
        (Scheme(4, 16, grid="nvfp4"), "nvfp4-pack-quantized"),
        (Scheme(8, 32, grid="mxfp8"), "mxfp8-quantized"),
    ],
    ids=str,
)
def test_how_a_scheme_is_stored(scheme: Scheme, layout: str) -> None:
    assert layout_of(scheme) == layout
    read = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, ["head"]))
    assert read.format == read.config_groups["group_0"].format == layout


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(3, 32, False), Scheme(8, None), Scheme(2, 16)], ids=str)
def test_weights_are_read_as_they_are_meant(scheme: Scheme) -> None:
    read = QuantizationConfig.model_validate(config_of({scheme: ["a"]}, ["b", "a.head", "b"]))
    weights = read.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (scheme.bits, scheme.symmetric)
    assert (weights.strategy, weights.group_size) == (
        ("channel", None) if scheme.group_size is None else ("group", scheme.group_size)
    )
    assert read.config_groups["group_0"].input_activations is None and read.ignore == ["a.head", "b"]
    assert read.quantization_status == "compressed" and read.quant_method == "compressed-tensors"


def test_zero_points_alone_are_to_be_unpacked_while_loading() -> None:
    """With a second scheme stock transformers would decode all as the first; without zero points it need not."""
    assert config_of({Scheme(4, 128, False): ["a"]}, [])["dequantize"] is True
    for groups in ({Scheme(4, 128): ["a"]}, {Scheme(4, 128, False): ["a"], Scheme(8, None): ["b"]}):
        assert "dequantize" not in config_of(groups, [])


def test_several_layouts_are_mixed_and_the_schemes_stay_in_order() -> None:
    mixed = config_of({W8A8: ["a"], Scheme(4, 128): ["c", "b"], Scheme(8, None): ["d"]}, [])
    assert mixed["format"] == "mixed-precision"
    groups = [(group["targets"], group["format"]) for group in mixed["config_groups"].values()]
    assert groups == [(["a"], "int-quantized"), (["b", "c"], "pack-quantized"), (["d"], "pack-quantized")]
    assert config_of({Scheme(8, None): ["d"], Scheme(4, 128): ["b"]}, [])["format"] == "pack-quantized"


def test_nothing_quantized_has_no_configuration() -> None:
    for groups in ({}, {Scheme(): []}):
        with pytest.raises(LlmqError, match="nothing is quantized"):
            config_of(groups, ["head"])


def test_modules_that_a_loader_does_not_count_as_linear_are_targets_by_name() -> None:
    one = config_of({Scheme(4, 128): ["a.x", "head"]}, ["b"])
    told = with_targets(one, ["head", "head"])
    assert told["config_groups"]["group_0"]["targets"] == ["Linear", "head"] and told["ignore"] == ["b"]
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    two = config_of({Scheme(8, None): ["a.z"], Scheme(4, 128): ["head"]}, [])
    assert with_targets(two, ["head"]) == two


def test_one_scheme_that_rounds_no_inputs_is_loaded_dense() -> None:
    assert loads_dense({Scheme(4, 128)}) and loads_dense({Scheme(8, None, grid="fp8")})
    assert not loads_dense({W8A8}) and not loads_dense({Scheme(4, 128), Scheme(8, 128)}) and not loads_dense(set())
    section = config_of({Scheme(4, 128): ["a"]}, ["b"])
    assert dense(section) == section | {"dequantize": True}
