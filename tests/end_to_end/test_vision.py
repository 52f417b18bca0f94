"""A vision-language model through every step that a causal one goes through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_one
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import llmq as package
from llmq import job
from llmq.grids.scheme import Scheme
from llmq.inference.pretrained import load_model
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent
from tests.architectures import tiny_vision
from tests.conftest import Run
from tests.llmq.blocks import apart
from tests.llmq.vision import an_image, write_llava

IDS = torch.randint(10, 250, (4, 32), generator=torch.Generator().manual_seed(9))
GPTQ = Recipe(methods=("gptq",), scheme=Scheme(4, 32))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_llava(tmp_path_factory.mktemp("vision") / "source", tiny_model)


@pytest.fixture(scope="module")
def written(source: Path) -> Path:
    out = source.parent / "gptq"
    job.quantize(str(source), out, GPTQ, ids=IDS)
    return out


def load_file(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, of every shard."""
    return {name: value for shard in folder.glob("*.safetensors") for name, value in load_one(shard).items()}


def stock(folder: Path, **options: Any) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs, use_cache=False).logits
    return found


def test_the_tower_is_neither_quantized_nor_read_before_the_blocks(source: Path, written: Path) -> None:
    plan = job.plan(str(source), GPTQ, ids=IDS)
    assert plan.structure.path == "model.language_model.layers" and len(plan.structure.blocks) == 3
    text = {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    # transformers asks the first parameter for the device.
    assert plan.structure.outside == text | {"model.vision_tower.embeddings.class_embedding"}
    before, after = load_file(source), load_file(written)
    tower = [name for name in before if "vision_tower" in name or "projector" in name]
    assert len(tower) > 30 and all(torch.equal(before[name], after[name]) for name in tower)
    ignored = json.loads((written / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.vision_tower.encoder.layers.0.mlp.fc1", "model.multi_modal_projector.linear_1"} <= {*ignored}


def test_others_open_it_and_see_the_image(source: Path, written: Path) -> None:
    model, told = stock(written, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    image, other, text = an_image(), an_image(1), {"input_ids": IDS}
    assert apart(logits(model, image), logits(model, other)) > 1e-3
    assert 1e-3 < apart(logits(model, image), logits(stock(source), image)) < 0.5
    ours = package.load(written, device_map="cpu")
    assert type(ours) is LlavaForConditionalGeneration
    for inputs in (image, text):
        assert apart(logits(ours, inputs), logits(model, inputs)) < 1e-4


def test_a_broken_run_goes_on_to_the_same_bytes(source: Path, written: Path, tmp_path: Path) -> None:
    class Breaks(Silent):
        def step(self, text: str) -> None:
            if text.startswith("block 1"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.quantize(str(source), tmp_path / "out", GPTQ, ids=IDS, watch=Breaks())
    assert not (tmp_path / "out" / "config.json").exists()
    job.quantize(str(source), tmp_path / "out", GPTQ, ids=IDS)
    names = ["config.json", *(shard.name for shard in written.glob("*.safetensors"))]
    assert all((tmp_path / "out" / name).read_bytes() == (written / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("methods", "scheme", "close"),
    [
        (("awq", "gptq"), Scheme(4, 32), 1e-4),
        # Stock bitsandbytes multiplies in bfloat16.
        (("nf4",), Scheme(4, 64, grid="nf4", double_quant=True), 0.03),
    ],
)
def test_transforms_and_other_formats(
    methods: tuple[str, ...], scheme: Scheme, close: float, source: Path, tmp_path: Path
) -> None:
    out, image = tmp_path / "out", an_image()
    report = job.quantize(str(source), out, Recipe(methods=methods, scheme=scheme), ids=IDS)
    assert len(report.quantized) == 21
    theirs = logits(stock(out), image)
    assert 1e-3 < apart(theirs, logits(stock(source), image)) < 0.5
    assert apart(logits(package.load(out, device_map="cpu"), image), theirs) < close


def test_the_command_line(source: Path, written: Path, text_file: Path, tmp_path: Path, llmq: Run) -> None:
    said = llmq("generate", written, "the quick", "--tokens", 4)
    assert said.returncode == 0 and said.stdout.startswith("the quick")
    done = llmq("eval", written, "--base", source, "--text", text_file, "--max-windows", 4, "--window", 64)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "LlavaForConditionalGeneration.from_pretrained" in (written / "README.md").read_text()
    inspected = llmq("inspect", written)
    assert inspected.returncode == 0 and "vision_tower" in inspected.stdout


def test_a_missing_processor_is_told(source: Path, tiny_model: Path, tmp_path: Path) -> None:
    bare = write_llava(tmp_path / "bare", tiny_model, processor=False)
    told = [line for line in job.plan(str(bare), GPTQ, ids=IDS).warnings if "processor" in line]
    assert len(told) == 1 and str(bare) in told[0] and "copy" in told[0]
    for folder in (source, tiny_model):
        assert not [line for line in job.plan(str(folder), GPTQ, ids=IDS).warnings if "processor" in line]


@pytest.mark.slow
def test_an_adapter_is_trained_on_the_decoder_alone(source: Path, tmp_path: Path, llmq: Run) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}", "completion": "b"}) + "\n" for i in range(8)))
    done = llmq("finetune", source, "--data", rows, "-o", tmp_path / "adapter", "--steps", 2)
    assert done.returncode == 0, done.stderr
    names = load_file(tmp_path / "adapter")
    assert len(names) == 42 and all("language_model.layers" in name for name in names)
    done = llmq("merge", source, tmp_path / "adapter", "-o", tmp_path / "merged", "--method", "rtn", "--group-size", 32)
    assert done.returncode == 0, done.stderr
    before = load_file(source)
    after = load_file(tmp_path / "merged")
    assert all(torch.equal(before[name], after[name]) for name in before if "vision_tower" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part", "whole"),
    [
        # The causal class is the text half, and finds its weights.
        ("qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        # It does not find them: the whole is quantized, measured and loaded.
        ("emu3", "Emu3ForConditionalGeneration", "Emu3ForConditionalGeneration"),
    ],
)
def test_where_the_causal_class_is_the_text_half_of_another(name: str, part: str, whole: str, tmp_path: Path) -> None:
    folder = tiny_vision.make(name, tmp_path / "source")
    job.quantize(str(folder), tmp_path / "out", Recipe(scheme=Scheme(4, 32), ragged="channel"), ids=IDS)
    measured = load_model(tmp_path / "out", kernels=True)
    loaded = package.load(tmp_path / "out", device_map="cpu", dtype="float32")
    assert (type(measured).__name__, type(loaded).__name__) == (part, whole)
    assert apart(logits(measured, {"input_ids": IDS}), logits(loaded, {"input_ids": IDS})) < 1e-5
