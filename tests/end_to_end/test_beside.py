"""What lies beside a decoder's blocks: kept bit for bit, or included and rounded without calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmq as package
from llmq import formats, job
from llmq.discovery.names import link
from llmq.formats.dequantized import open_source
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from tests.architectures import tiny
from tests.conftest import Run
from tests.llmq.blocks import apart
from tests.llmq.formats import published
from tests.llmq.planning.test_named_class import vision
from tests.llmq.vision import an_image, write_llava

IDS = torch.randint(10, 190, (2, 32), generator=torch.Generator().manual_seed(9))
W4 = Scheme(4, 32)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def twin(kind: Any, source: Path, report: Report, folder: Path) -> Any:
    """The unquantized model of a class, with the folder's dequantized weights, as far as the class has them."""
    model, written = kind.from_pretrained(source, dtype=torch.float32).eval(), stored(folder)
    places = link(model, {f"{row.name}.weight": row.shape for row in report.quantized}).source
    names = {tensor: parameter for parameter, tensor in places.items()}
    for row in report.quantized:
        suffixes = formats.of(row.scheme).spec(row.shape, row.scheme, torch.float32)
        value = formats.of(row.scheme).unpack({s: written[f"{row.name}.{s}"] for s in suffixes}, row.scheme)
        if f"{row.name}.weight" in names:
            model.get_parameter(names[f"{row.name}.weight"]).data = value.dequantize(torch.float32)
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs, use_cache=False).logits
    return found


def image_of_patches() -> dict[str, Tensor]:
    """An image and text for the model of `vision`, which its causal class cannot take."""
    ids = torch.arange(3, 35)[None].clone()
    ids[0, 3], ids[0, 4:8], ids[0, 8] = 202, 200, 203
    patches = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 4]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == 200).long()}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["only the named class", "the model's own class"])
@pytest.mark.parametrize(
    ("methods", "scheme", "more"),
    [
        ("gptq", W4, {}),
        ("hqq", W4, {"overrides": (("re:(vision_tower|visual)", Scheme(8, 32)),)}),
        ("rtn", W4, {"include": ("re:vision_tower|visual|multi_modal|lm_head",)}),
    ],
)
def test_an_included_tower_in_stock_transformers(
    which: str, methods: str, scheme: Scheme, more: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    if which == "only the named class":
        kind, image = vision(tmp_path / "m"), image_of_patches()
    else:
        write_llava(tmp_path / "m", tiny_model)
        kind, image = transformers.LlavaForConditionalGeneration, an_image()
    made = Recipe(**{"methods": (methods,), "scheme": scheme, "include": ("re:vision_tower|visual",)} | more)
    report = job.quantize(str(tmp_path / "m"), tmp_path / "q", made, ids=IDS)
    outside = [row for row in report.quantized if row.block is None]
    assert len(outside) >= 10
    notes = {note for row in outside for note in row.notes}
    assert notes == ({"no calibration: rounded to nearest"} if methods == "gptq" else set())
    model, told = kind.from_pretrained(tmp_path / "q", dtype=torch.float32, output_loading_info=True)  # type: ignore[attr-defined]
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]
    same = twin(kind, tmp_path / "m", report, tmp_path / "q")
    for inputs in (image, {"input_ids": IDS}):
        assert torch.equal(logits(model.eval(), inputs), logits(same, inputs))
    ours = package.load(tmp_path / "q", device_map="cpu", dtype="float32")
    assert apart(logits(ours, {"input_ids": IDS}), logits(same, {"input_ids": IDS})) < 1e-5
    # Blocks are those of a run without the tower, which is calibrated with nothing.
    plain = Recipe(**{"methods": (methods,), "scheme": scheme})
    job.quantize(str(tmp_path / "m"), tmp_path / "plain", plain, ids=IDS)
    blocks = {row.name for row in report.quantized if row.block is not None}
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "q")
    mine = [name for name in before if name.rpartition(".")[0] in blocks]
    assert len(mine) == 3 * len(blocks) and all(torch.equal(before[name], after[name]) for name in mine)


def with_mtp(kind: str, folder: Path) -> tuple[Path, str]:
    """A tiny model with a layer for multi-token prediction, as published ones store it: the folder, and its prefix."""
    tiny.make(kind, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    last, rng = config["num_hidden_layers"] - 1, torch.Generator().manual_seed(3)
    numbered = kind.startswith(("deepseek", "glm"))
    prefix = f"model.layers.{last + 1}." if numbered else "mtp."
    place = prefix if numbered else "mtp.layers.0."
    layer = {name: value for name, value in tensors.items() if f"layers.{last}." in name}
    for name, value in layer.items():
        tensors[place + name.partition(f"layers.{last}.")[2]] = value + 0.01 * torch.randn(value.shape, generator=rng)
    tensors |= {f"{prefix}eh_proj.weight": torch.randn(64, 128, generator=rng), f"{prefix}hnorm.weight": torch.ones(64)}
    if numbered:
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder, prefix


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_text"])
def test_layers_for_multi_token_prediction(kind: str, tmp_path: Path) -> None:
    """Kept bit for bit and ignored; included, those of the same make as a block's are rounded. Others read the rest."""
    source, prefix = with_mtp(kind, tmp_path / "m")
    before = {name: value for name, value in stored(source).items() if name.startswith(prefix)}
    made = {"methods": ("gptq",), "scheme": Scheme(4, 16)}
    job.quantize(str(source), tmp_path / "kept", Recipe(**made), ids=IDS)
    after = stored(tmp_path / "kept")
    assert len(before) > 12 and all(torch.equal(after[name], value) for name, value in before.items())
    matrices = {name.removesuffix(".weight") for name, value in before.items() if value.dim() == 2}
    ignored = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]["ignore"]
    assert matrices <= {*ignored}

    recipe = Recipe(**made, include=(prefix.rstrip("."),))
    report = job.quantize(str(source), tmp_path / "in", recipe, ids=IDS)
    mine = {row.name for row in report.quantized if row.name.startswith(prefix)}
    left = {row.name for row in report.kept if row.name.startswith(prefix)}
    assert mine | left == matrices and f"{prefix}eh_proj" in left and len(mine) >= 7
    assert all(not name.endswith(("mlp.gate", "shared_head.head")) for name in mine)
    assert {row.block for row in report.quantized if row.name in mine} == {None}
    after = stored(tmp_path / "in")
    for row in report.quantized:
        if row.name in mine:
            suffixes = formats.of(row.scheme).spec(row.shape, row.scheme, torch.float32)
            parts = {suffix: after[f"{row.name}.{suffix}"] for suffix in suffixes}
            value = formats.of(row.scheme).unpack(parts, row.scheme).dequantize(torch.float32)
            dense = before[f"{row.name}.weight"]
            assert row.error == pytest.approx(float((value - dense).norm() / dense.norm()), rel=1e-3)
    ignored = json.loads((tmp_path / "in" / "config.json").read_text())["quantization_config"]["ignore"]
    assert left <= {*ignored} and not mine & {*ignored}
    found = []
    for folder in ("kept", "in"):
        auto: Any = transformers.AutoModelForCausalLM
        model, told = auto.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not told["missing_keys"] and not told["mismatched_keys"]
        assert all(name.startswith(prefix) for name in told["unexpected_keys"])
        ours = package.load(tmp_path / folder, device_map="cpu", dtype="float32")
        found += [logits(model.eval(), {"input_ids": IDS}), logits(ours, {"input_ids": IDS})]
    assert all(apart(other, found[0]) < 1e-5 for other in found[1:])


@pytest.mark.slow
def test_a_layer_for_prediction_that_is_published_in_fp8(tmp_path: Path) -> None:
    """Read dequantized, as the blocks are: rounded from there, or written so."""
    source, prefix = with_mtp("deepseek_v3", tmp_path / "m")
    published.fp8(source)
    name = f"{prefix}self_attn.o_proj"
    dense = open_source(source, False).read(f"{name}.weight")
    made = {"methods": ("rtn",), "scheme": Scheme(4, 16)}
    job.quantize(str(source), tmp_path / "kept", Recipe(**made), ids=IDS)
    kept = stored(tmp_path / "kept")
    assert torch.equal(kept[f"{name}.weight"], dense) and f"{name}.weight_scale_inv" not in kept
    job.quantize(str(source), tmp_path / "in", Recipe(**made, include=(prefix.rstrip("."),)), ids=IDS)
    scheme, written = Scheme(4, 16), stored(tmp_path / "in")
    suffixes = formats.of(scheme).spec(tuple(dense.shape), scheme, dense.dtype)
    value = formats.of(scheme).unpack({s: written[f"{name}.{s}"] for s in suffixes}, scheme).dequantize(dense.dtype)
    assert torch.equal(value, round_to_nearest(dense, scheme, dense.dtype).dequantize(dense.dtype))


@pytest.mark.slow
def test_a_tower_with_rounded_inputs(tmp_path: Path, tiny_model: Path) -> None:
    source = write_llava(tmp_path / "m", tiny_model)
    recipe = Recipe(methods=("rtn",), scheme=Scheme(8, None, activations=Activations()), include=("vision_tower",))
    report = job.quantize(str(source), tmp_path / "q", recipe, ids=IDS)
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "q", dtype=torch.float32)
    same = twin(transformers.LlavaForConditionalGeneration, source, report, tmp_path / "q")
    assert 0 < apart(logits(model.eval(), an_image()), logits(same, an_image())) < 0.05


def test_the_command_line(tmp_path: Path, tiny_model: Path, text_file: Path, llmq: Run) -> None:
    source = write_llava(tmp_path / "m", tiny_model)
    options = ("--group-size", 32, "--include", "vision_tower", "--samples", 2, "--seqlen", 32, "--calib", text_file)
    told = llmq("plan", source, *options)
    assert told.returncode == 0 and "outside the blocks none: rounded to nearest" in " ".join(told.stdout.split())
    done = llmq("quantize", source, "-o", tmp_path / "q", *options)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "no calibration: rounded to nearest" in said and "12 weights outside the blocks" in said
    assert (
        "outside the decoder's blocks: 12 weights, no calibration: rounded to nearest"
        in (tmp_path / "q" / "README.md").read_text()
    )
    wrong = llmq("quantize", source, "-o", tmp_path / "w", *options, "--include", "visual")
    assert wrong.returncode == 2 and "--include 'visual' matches no weight" in wrong.stderr.replace("\n", " ")
