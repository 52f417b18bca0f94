"""FP8 weights dequantized: bit for bit as by transformers and by compressed-tensors; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq import job
from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError
from llmq.formats.compressed_tensors.inspect import scheme_of
from llmq.formats.dequantized import Dequantized, open_source
from llmq.formats.fp8 import dequantizes
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.llmq.formats import published
from tests.llmq.formats.published import E4M3
from tests.llmq.refusal import refused

BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
W = "a.b.weight"


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def folder(path: Path, section: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Path:
    stored = {"norm.weight": torch.ones(4, dtype=torch.bfloat16)} | {n: t.contiguous() for n, t in tensors.items()}
    save_file(stored, path / "model.safetensors")
    config = {} if section is None else {"quantization_config": section}
    (path / "config.json").write_text(json.dumps(config))
    return path


def opened(path: Path, section: dict[str, Any], tensors: dict[str, Tensor]) -> Dequantized:
    source = open_source(folder(path, section, tensors))
    assert isinstance(source, Dequantized)
    return source


def same_rows(source: Dequantized, name: str, value: Tensor) -> None:
    """Whatever rows are read, they are those of the whole."""
    assert torch.equal(source.read(name), value)
    count = value.shape[0]
    for start, stop in ((0, 1), (count - 1, count), (0, count), (count // 3, count // 2), (1, count), (2, 2)):
        assert torch.equal(source.read_rows(name, start, stop), value[start:stop])


@pytest.mark.parametrize("shape", [(64, 96), (16, 32), (48, 32), (3, 32, 64)])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8])
def test_tiles_are_those_of_transformers(tmp_path: Path, shape: tuple[int, ...], scale: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    exponents = scale in (torch.float8_e8m0fnu, torch.uint8)
    codes, scales = published.tiled(made(*shape), (16, 32), scale_fmt="ue8m0" if exponents else "float")
    scales = scales.view(torch.uint8) if scale == torch.uint8 else scales.to(scale)
    section = BLOCKS | ({"scale_fmt": "ue8m0"} if exponents else {})
    source = opened(tmp_path, section, {W: codes, f"{W}_scale_inv": scales})
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert sorted(source.names()) == [W, "norm.weight"]
    assert source.info(W).shape == shape and source.info(W).dtype == expected.dtype == torch.bfloat16
    same_rows(source, W, expected)
    assert float((expected - made(*shape)).norm() / made(*shape).norm()) < (0.05 if scale != torch.uint8 else 0.1)


@pytest.mark.parametrize("shape", [(50, 100), (17, 33), (7, 5), (16, 40), (40, 32)])
def test_tiles_at_the_edges_are_cut_short(tmp_path: Path, shape: tuple[int, int]) -> None:
    """transformers' own dequantization fails on these, or takes [40, 32] with 3 scales in tiles of another size."""
    weight = made(*shape)
    codes, scales = published.tiled(weight, (16, 32))
    expected = torch.empty(shape, dtype=torch.bfloat16)
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected[row, column] = codes[row, column].float() * scales[row // 16, column // 32]
    same_rows(opened(tmp_path, BLOCKS, {W: codes, f"{W}_scale_inv": scales}), W, expected)
    assert float((expected - weight).float().norm() / weight.float().norm()) < 0.05


def test_a_weight_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmq.formats import dequantized

    codes, scales = published.tiled(made(64, 96), (16, 32))
    source = opened(tmp_path, BLOCKS, {W: codes, f"{W}_scale_inv": scales})
    at_once = source.read(W)
    for chunk in (1, 5 * 96, 17 * 96):
        monkeypatch.setattr(dequantized, "CHUNK", chunk)
        same_rows(source, W, at_once)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)])
@pytest.mark.parametrize("method", ["fp8", "modelopt"])
def test_one_scale_or_one_for_each_row(tmp_path: Path, shape: tuple[int, ...], method: str) -> None:
    weight = made(24, 40)
    rows = 24 in shape
    codes, scale = published.by_row(weight, torch.float32) if rows else published.whole(weight)
    name = f"{W}_scale_inv" if method == "fp8" else f"{W}_scale"
    section = {"quant_method": method, "quant_algo": "FP8", "weight_block_size": None}
    source = opened(tmp_path, section, {W: codes, name: scale.reshape(shape)})
    same_rows(source, W, (codes.float() * scale.reshape(-1, 1)).bfloat16())


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (3, 24, 1)])
def test_scales_of_a_stack(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes, scale = made(3, 24, 40).to(E4M3), torch.rand(shape) + 0.5
    section = {"quant_method": "fp8", "weight_block_size": None}
    source = opened(tmp_path, section, {"a.up": codes, "a.up_scale_inv": scale})
    expected = codes.float() * (scale if scale.dim() == 3 else scale.reshape(3, 1, 1))
    same_rows(source, "a.up", expected.bfloat16())


@pytest.mark.parametrize(
    "weights",
    [
        {"strategy": "tensor"},
        {"strategy": "channel"},
        {"strategy": "block", "block_structure": [16, 32]},
        {"strategy": "group", "group_size": 20},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_those_of_compressed_tensors(tmp_path: Path, weights: dict[str, Any], dtype: torch.dtype) -> None:
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=QuantizationArgs(num_bits=8))
    weight = made(40, 60, dtype=dtype)
    shape = {"tensor": (1,), "channel": (40, 1), "block": (3, 2), "group": (40, 3)}[weights["strategy"]]
    scale = (0.005 + 0.01 * torch.rand(shape)).to(dtype)
    stored = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert stored["weight"].dtype == E4M3
    expected = FloatQuantizationCompressor.decompress(dict(stored), scheme)["weight"].bfloat16()
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
    }
    tensors = {f"a.b.{name}": tensor for name, tensor in stored.items()}
    source = opened(tmp_path, section, tensors | {"a.b.input_scale": torch.ones(1)})
    same_rows(source, W, expected)
    assert sorted(source.names()) == [W, "norm.weight"]


CT: dict[str, Any] = {
    "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}},
    "format": "float-quantized",
}


@pytest.mark.parametrize(
    ("method", "section", "read"),
    [
        ("fp8", {}, True),
        ("modelopt", {"quant_algo": "FP8"}, True),
        ("modelopt", {"quant_algo": "nvfp4"}, True),
        ("modelopt_fp4", {"quant_algo": "NVFP4"}, True),
        ("modelopt", {"quant_algo": "NVFP4_AWQ"}, False),
        ("modelopt", {"quant_algo": "INT4_AWQ"}, False),
        ("modelopt", {}, False),
        ("modelopt", {"quant_algo": "MIXED_PRECISION"}, False),
        ("modelopt", {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": None}}, False),
        ("modelopt", {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}}, True),
        ("fbgemm_fp8", {}, True),
        ("compressed-tensors", CT, True),
        ("compressed-tensors", CT | {"transform_config": {"config_groups": {"R1": {}}}}, False),
        ("compressed-tensors", CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, False),
        ("compressed-tensors", CT | {"format": "pack-quantized"}, False),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, False),
        (
            "compressed-tensors",
            {"config_groups": CT["config_groups"] | {"h": {"weights": {"type": "float", "num_bits": 4}}}},
            False,
        ),
        ("compressed-tensors", {"config_groups": {"g": {"weights": None}}}, False),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "strategy": "x"}}}},
            False,
        ),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"type": "float", "num_bits": [8]}}}}, False),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "symmetric": False}}}},
            False,
        ),
        ("compressed-tensors", {}, False),
        ("gptq", {}, False),
        (None, {}, False),
    ],
)
def test_what_is_read(method: str | None, section: dict[str, Any], read: bool) -> None:
    assert dequantizes(method, section) is read


CODES, SCALES = published.tiled(made(40, 60), (16, 32))
NAN = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("scales", "section", "words"),
    [
        (None, {}, (W, "float8_e4m3fn", "scales (a.b.weight_scale_inv) are missing")),
        (SCALES[:2], {}, ("weight_scale_inv is [2, 2] for a weight [40, 60]", "tiles of 16x32")),
        (SCALES, {"weight_block_size": [16, 16]}, ("is [3, 2]", "tiles of 16x16")),
        (SCALES, {"weight_block_size": None}, ("is [3, 2]", "one scale for the weight or each row")),
        (SCALES, {"weight_block_size": [16]}, ("config.json", "[16]", "a.b.weight")),
        (SCALES, {"weight_block_size": [0, 32]}, ("config.json", "[0, 32]")),
        (SCALES, {"weight_block_size": 128}, ("config.json", "128")),
        (torch.ones(1), {}, ("is [1] for a weight", "tiles of 16x32")),
        (SCALES.int(), {}, ("weight_scale_inv is int32",)),
        (SCALES.double(), {}, ("weight_scale_inv is float64",)),
        (SCALES.to(torch.uint8), {}, ("weight_scale_inv is uint8",)),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, scales: Tensor | None, section: dict[str, Any], words: tuple[str, ...]
) -> None:
    tensors = {W: CODES} | ({} if scales is None else {f"{W}_scale_inv": scales})
    path = folder(tmp_path, BLOCKS | section, tensors)
    refused(lambda: open_source(path), str(tmp_path), "download", "start from the unquantized model", *words)


def test_a_vector_in_float8_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, BLOCKS, {W: CODES[0].clone(), f"{W}_scale_inv": SCALES})
    refused(lambda: open_source(path), "for a weight [60]")


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        (W, (21, 3), (W, "nan at [21, 3]")),
        (f"{W}_scale_inv", (2, 1), (f"{W}_scale_inv", "nan at")),
    ],
)
def test_a_nan_is_named(tmp_path: Path, name: str, place: tuple[int, int], words: tuple[str, ...]) -> None:
    tensors = {W: CODES.clone(), f"{W}_scale_inv": SCALES.clone()}
    tensors[name][place] = NAN.to(tensors[name].dtype)
    source = opened(tmp_path, BLOCKS, tensors)
    refused(lambda: source.read(W), "model.safetensors", "download", *words)
    assert torch.isfinite(source.read_rows(W, 0, 16)).all()


def test_exponents_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    scales = torch.full((3, 2), 120, dtype=torch.uint8)
    scales[1, 1] = 255
    source = opened(tmp_path, BLOCKS | {"scale_fmt": "ue8m0"}, {W: CODES, f"{W}_scale_inv": scales})
    refused(lambda: source.read(W), f"{W}_scale_inv", "nan")


def test_what_is_not_in_float8_is_read_as_it_is(tmp_path: Path) -> None:
    """Also scales of activations: those beside a weight in FP8 are left out, others are not its business."""
    plain = made(24, 40)
    tensors = {
        W: CODES, f"{W}_scale_inv": SCALES, "a.b.activation_scale": torch.ones(1), "a.b.k_scale": torch.ones(1),
        "a.b.bias": made(40), "a.c.weight": plain, "a.c.input_scale": torch.ones(1),
    }  # fmt: skip
    source = opened(tmp_path, BLOCKS | {"modules_to_not_convert": ["a.c"]}, tensors)
    assert sorted(source.names()) == ["a.b.bias", W, "a.c.input_scale", "a.c.weight", "norm.weight"]
    assert torch.equal(source.read("a.c.weight"), plain) and not source.changes_tensor("a.c.weight")
    assert torch.equal(source.read_rows("a.c.weight", 3, 5), plain[3:5])
    assert len(source.warnings) == 2
    assert "a.b.activation_scale" in source.warnings[1] and "a.c" not in source.warnings[1]


def test_scales_of_a_cache_in_the_module_above_are_left_out(tmp_path: Path) -> None:
    tensors = {W: CODES, f"{W}_scale_inv": SCALES, "a.c.weight": CODES.clone(), "a.c.weight_scale_inv": SCALES.clone()}
    others = {"a.k_scale": torch.ones(1), "a.v_scale": torch.ones(1), "a.logit_scale": torch.ones(1)}
    source = opened(tmp_path, BLOCKS, tensors | others | {"k_scale": torch.ones(1)})
    assert sorted(source.names()) == [W, "a.c.weight", "a.logit_scale", "k_scale", "norm.weight"]
    assert source.warnings[1].startswith("a.k_scale, a.v_scale say")


def test_stacks_beside_each_other_keep_their_scales_apart(tmp_path: Path) -> None:
    codes, scale = made(3, 24, 40).to(E4M3), torch.rand(3, 1, 1) + 0.5
    stacks = {f"a.{name}": codes.clone() for name in ("up", "down")}
    stacks |= {f"a.{name}_scale": scale.clone() for name in ("up", "down")}
    section = {"quant_method": "fp8", "weight_block_size": None}
    source = opened(tmp_path, section, stacks | {"a.up_input_scale": torch.ones(1)})
    assert sorted(source.names()) == ["a.down", "a.up", "norm.weight"]
    assert "a.up_input_scale say" in source.warnings[1]


@pytest.mark.parametrize("name", ["a.b.scale", "a.b.qscale_weight", "a.b.weight_scale_inv", "a.b.weight_scale"])
def test_names_of_scales(tmp_path: Path, name: str) -> None:
    """transformers renames the first two."""
    source = opened(tmp_path, BLOCKS, {W: CODES, name: SCALES})
    assert sorted(source.names()) == [W, "norm.weight"] and torch.isfinite(source.read(W)).all()


def test_a_second_set_of_scales_stays_to_be_refused(tmp_path: Path) -> None:
    source = opened(tmp_path, BLOCKS, {W: CODES, f"{W}_scale_inv": SCALES, f"{W}_scale": SCALES.clone()})
    assert f"{W}_scale" in source.names()


def test_a_folder_that_says_nothing_is_read_as_it_is(tmp_path: Path) -> None:
    path = folder(tmp_path, None, {W: CODES, f"{W}_scale_inv": SCALES})
    source = open_source(path)
    assert isinstance(source, FolderSource) and source.info(W).dtype == E4M3


def test_scales_that_change_what_a_weight_means_stay_to_be_refused(tmp_path: Path, tiny_model: Path) -> None:
    """`pre_quant_scale` divides the inputs of a weight, which is wrong without it."""
    folder = published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    stem = next(name for name in tensors if name.endswith("down_proj.weight")).removesuffix("weight")
    width = tensors[f"{stem}weight"].shape[1]
    save_file(tensors | {f"{stem}input_scale": torch.ones(())}, folder / "model.safetensors", {"format": "pt"})
    assert f"{stem}input_scale" not in open_source(folder).names()
    save_file(tensors | {f"{stem}pre_quant_scale": torch.full((width,), 2.0)}, folder / "model.safetensors")
    with pytest.raises(LlmqError, match=f"{stem}pre_quant_scale beside it"):
        job.plan(str(folder), Recipe(methods=("rtn",), scheme=Scheme(4, 16)))


def test_a_damaged_section_is_no_traceback(tmp_path: Path) -> None:
    group = {"weights": {"type": "float", "num_bits": 8}, "targets": ["re:(("]}
    section = {"config_groups": {"g": group}, "sparsity_config": "x"}
    assert not dequantizes("compressed-tensors", section)
    refused(
        lambda: scheme_of(tmp_path, "a.b", section), str(tmp_path / "config.json"), "re:((", "no regular", "download"
    )
    assert scheme_of(tmp_path, "a.b", {"config_groups": {"g": group | {"targets": 5}}}) == {}
