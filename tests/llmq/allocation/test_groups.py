"""Which weights share a scheme, and which schemes they may have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmq import job
from llmq.allocation.groups import EXPERTS, Group, groups_of
from llmq.grids.scheme import Scheme
from llmq.planning.weights import stored_bytes
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.allocation.tasks import CANDIDATES, ids

RECIPE = Recipe(("rtn",), Scheme(4, 16))


def groups(folder: Path, recipe: Recipe = RECIPE, candidates: tuple[Scheme | None, ...] = CANDIDATES) -> list[Group]:
    plan = job.plan(str(folder), recipe, ids=ids())
    return groups_of(plan.weights, recipe, candidates, plan.dtype)


def parts(group: Group) -> list[str]:
    return [weight.name.rpartition(".")[2] for weight in group.weights]


def test_what_servers_fuse_is_a_group(tiny_model: Path) -> None:
    found = groups(tiny_model)
    one = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [parts(group) for group in found] == one * 3
    assert [group.block for group in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert found[0].name == "model.layers.0.self_attn.q_proj (+ k_proj, v_proj)"
    first = found[0]
    assert first.candidates == CANDIDATES and first.numbers == 64 * (64 + 32 + 32)
    for scheme, nbytes in zip(first.candidates, first.nbytes, strict=True):
        alone = [w.before if scheme is None else stored_bytes(w.shape, scheme, torch.float32) for w in first.weights]
        assert nbytes == sum(alone)
    assert [*first.nbytes] == sorted(first.nbytes)


def test_for_other_loaders_each_weight_is_alone(tiny_model: Path) -> None:
    assert len(groups(tiny_model, replace(RECIPE, loader="transformers"))) == 21


def test_weights_with_a_choice_of_the_users_are_left_alone(tiny_model: Path) -> None:
    recipe = replace(RECIPE, keep=("layers.0",), overrides=(("down_proj", Scheme(8, 16)),))
    found = groups(tiny_model, recipe)
    assert [parts(group)[0] for group in found] == ["q_proj", "o_proj", "gate_proj"] * 2


def test_experts_of_all_blocks_are_one_group(tmp_path: Path) -> None:
    tiny.make("qwen3_moe", tmp_path / "m")
    found = groups(tmp_path / "m")
    (experts,) = [group for group in found if group.experts]
    assert experts.name == EXPERTS and experts.block is None
    assert len({weight.block for weight in experts.weights}) > 1
    assert all(weight.expert is not None for weight in experts.weights)


def test_a_candidate_that_divides_not_all_widths_is_left_out_there(tiny_model: Path) -> None:
    wide, channel = Scheme(2, 128), Scheme(3, None)
    found = groups(tiny_model, candidates=(wide, channel, None))
    assert {parts(group)[0]: group.candidates for group in found} == {
        "q_proj": (channel, None),
        "o_proj": (channel, None),
        "gate_proj": (channel, None),
        "down_proj": (wide, channel, None),
    }
    ragged = groups(tiny_model, replace(RECIPE, ragged="smaller"), (wide, None))
    assert ragged[0].candidates == (Scheme(2, 64), None)


@pytest.mark.parametrize("name", ["lm_head"])
def test_the_output_embedding_takes_part_if_it_is_included(tiny_model: Path, name: str) -> None:
    found = groups(tiny_model, replace(RECIPE, include=(name,)))
    assert found[-1].name == name and found[-1].block is None and not found[-1].experts
