"""Types that read images: quantized through the class that config.json names, on types chosen for variety.

scripts/sweep_architectures.py does it for all.
"""

from __future__ import annotations

from pathlib import Path

import checks
import checks_vision
import pictures
import pytest
import tiny
import tiny_vision
import torch

import llmq
from llmq import job
from llmq.errors import LlmqError

TYPES = [
    "gemma3",  # its causal class is the whole model; tokens of an image see each other
    "idefics3",  # takes its device from the vision tower, which text does not read
    "llava",
    "mistral3",
    "mllama",  # blocks that only an image reaches
    "qwen2_5_vl",  # positions of three axes
    "qwen3_5",  # its causal class is the text half
]
STACKED = [
    "qwen3_vl_moe",  # a tensor for all experts, transposed on disk; some blocks add features of the image
    "step3p7",  # two such tensors, which transformers joins; others that it cuts
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loader"), [(n, "any") for n in TYPES] + [(n, "llmq") for n in STACKED])
def test_text_and_image_give_the_logits_of_the_weights_in_memory(name: str, loader: str, tmp_path: Path) -> None:
    source = tiny_vision.make(name, tmp_path / "source")
    done = checks_vision.quantized(
        name, source, tmp_path / "out", tiny.tokens(4, 32, seed=2), tiny.tokens(), loader=loader
    )
    assert not done.faults
    assert done.text <= 1e-5
    assert done.image is not None and done.image <= 1e-5
    assert 1e-3 < done.moved < 1
    assert done.seeing is not None and done.seeing > 1e-2
    tower = [name for name in done.copied if "vision" in name or "visual" in name]
    assert len(tower) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idefics3", "llava", "qwen3_vl_moe"])
def test_discovery_agrees_with_an_ordinary_forward_pass_of_the_whole_model(name: str, tmp_path: Path) -> None:
    source = tiny_vision.make(name, tmp_path)
    structure, faults = checks.faults(source, tiny.tokens(), kind=tiny_vision.kind(name))
    assert not faults
    assert all("vision" not in block.name and "visual" not in block.name for block in structure.blocks)


def test_a_type_that_demands_an_image_is_refused(tmp_path: Path) -> None:
    source = tiny_vision.make("kosmos-2", tmp_path)
    with pytest.raises(LlmqError, match="does not run on text alone.*its part text_model may"):
        job.plan(str(source), llmq.Recipe(methods=("rtn",), scheme=llmq.Scheme(4, 32)))


def test_pictures_are_random_and_the_same_for_a_seed() -> None:
    model = tiny_vision.model("llava")
    one, again, other = (pictures.picture(model, seed)["pixel_values"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
