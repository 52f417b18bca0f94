"""What transformers joins or cuts while loading: every parameter made here of stored tensors is the one it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq.discovery import blocks as discover
from llmq.discovery.names import Links, link
from tests.architectures import tiny

QUICK = ("mixtral", "qwen3_moe", "kimi_linear", "hrm_text", "inkling2_text")
"""Renamed and numbered experts, patterns with escapes, tensors that are cut, and one that is interleaved."""
CONVERTED = """afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1
    dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa hunyuan_v1_moe
    hy_v3 jamba kolibri1 laguna lfm2_moe longcat_flash mellum mimo_v2_flash minimax minimax_m2 nemotron_h olmo_hybrid
    olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_next qwen4_exp qwen4_exp_text solar_open"""
FUSED = """aria_text dbrx gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hy_v4 inkling_text jetmoe
    llama4 llama4_text minimax_m3_vl_text zaya"""
"""Types whose experts are stored as stacks."""


def stored_in(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def compared(folder: Path) -> Links:
    """The links of a folder, all of whose parameters and buffers were compared with those of stock transformers."""
    stored = stored_in(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    links = link(discover.build(folder, torch.float32), {n: t.shape for n, t in stored.items()})
    assert not links.failed
    state = model.state_dict()
    assert {n for n, _ in model.named_parameters()} <= set(links.names()) <= set(state)
    for name in links.names():
        assert torch.equal(links.fill(name, state[name].shape, stored.__getitem__), state[name]), name
    return links


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in f"{CONVERTED} {FUSED}".split())]
)
def test_every_parameter_is_made_of_its_stored_tensors(kind: str, tmp_path: Path) -> None:
    if kind not in tiny.TYPES:
        pytest.skip(f"this transformers has no {kind}")
    links = compared(tiny.make(kind, tmp_path))
    assert bool(links.slices or links.cuts or links.conversions) is (kind not in FUSED.split())
    assert set(links.conversions) == ({n for n in links.conversions if "gate_up" in n} if "inkling" in kind else set())


def test_the_parts_of_a_stack_are_whole_experts(tmp_path: Path) -> None:
    links = compared(tiny.make("mixtral", tmp_path))
    model = discover.build(tmp_path, torch.float32)
    for name, pieces in links.slices.items():
        experts, rows, width = model.get_parameter(name).shape
        halves = len(pieces) // experts
        assert {piece.part.shape for piece in pieces} == {(rows // halves, width)}
        assert sorted(piece.part.offset for piece in pieces) == [
            i * (rows // halves) * width for i in range(len(pieces))
        ]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_stacks_that_are_stored_as_such_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    """The same type may be stored either way: the names in the checkpoint decide, not the type."""
    folder = tiny.make(kind, tmp_path)
    joined = compared(folder).slices
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    links = compared(folder)
    assert not links.slices and set(joined) <= set(links.source)


def test_a_missing_or_misshapen_expert_is_said(tmp_path: Path) -> None:
    stored = {n: t.shape for n, t in stored_in(tiny.make("qwen3_moe", tmp_path)).items()}
    model = discover.build(tmp_path, torch.float32)
    one = next(n for n in stored if "experts.2." in n and "down" in n)
    parameter = next(p for p, s in link(model, stored).slices.items() if one in {piece.tensor for piece in s})
    fewer = link(model, {n: s for n, s in stored.items() if n != one})
    assert parameter not in fewer.names() and f"has no tensor {one}: it is incomplete" in fewer.failed[parameter]
    gate = one.replace("down", "gate")
    both = link(model, {n: s for n, s in stored.items() if n != gate})
    assert any(f"has no tensor {gate}: it is incomplete" in why for why in both.failed.values())
    other = link(model, stored | {one: torch.Size([3, 5])})
    assert parameter not in other.names() and "transformers cannot make it" in other.failed[parameter]
