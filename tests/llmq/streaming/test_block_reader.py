"""A block's weights in, from the checkpoint; and its memory freed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llmq import job
from llmq.grids.scheme import Scheme
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from llmq.streaming.block_reader import BlockReader, discard, states_of
from tests.llmq.refusal import refused

CPU = torch.device("cpu")
IDS = torch.arange(64).view(2, 32)


@pytest.fixture
def plan(tiny_model: Path) -> Plan:
    return job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32)), ids=IDS)


def test_filled_then_discarded(plan: Plan) -> None:
    block = plan.blocks[1]
    assert all(p.is_meta for p in block.module.parameters())
    module = BlockReader(plan, CPU).fill(block)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, plan.source.read(block.tensors[name][0]).to(plan.dtype))
    discard(module)
    assert all(p.is_meta for p in block.module.parameters())


def test_a_missing_tensor_is_named(plan: Plan) -> None:
    name = f"{plan.blocks[0].name}.mlp.up_proj.weight"
    del plan.links.source[name]
    refused(lambda: BlockReader(plan, CPU).fill(plan.blocks[0]), name, "no tensor")


def test_states_are_those_of_the_planned_weights(plan: Plan) -> None:
    block = plan.blocks[0]
    states = states_of(BlockReader(plan, CPU).fill(block), block.weights)
    assert [state.name for state in states] == [weight.name for weight in block.weights.values()]
    for state, weight in zip(states, block.weights.values(), strict=True):
        assert (
            torch.equal(state.value, plan.source.read(weight.tensor).to(plan.dtype)) and state.scheme == weight.scheme
        )


def test_what_is_expected_is_what_is_read(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    told: set[tuple[int, int]] = set()
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, size, advice: told.add((begin, size)), raising=False)
    block = plan.blocks[1]
    BlockReader(plan, CPU).expect(block)
    assert told == {(info.begin, info.nbytes) for info in map(plan.source.info, block.stored)}

    def gone(path: Path, flags: int) -> int:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", gone)
    BlockReader(plan, CPU).expect(block)  # A hint: that a file is gone, its reader tells.
