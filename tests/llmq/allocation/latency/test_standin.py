"""The stand-in is built as loading builds the model of a folder: the same layers, in the same layouts and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmq
from llmq import job
from llmq.allocation import allocate
from llmq.allocation.goal import Goal
from llmq.allocation.groups import Group
from llmq.allocation.latency import standin as module
from llmq.allocation.latency.standin import cache_bytes, nbytes, places, standin
from llmq.grids.scheme import Scheme
from llmq.inference.layer import QuantLinear
from llmq.inference.stack import PackedStack
from llmq.planning.types import Plan
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.allocation.tasks import CPU, ids

SCHEME = Scheme(4, 16)
# Plain layers; windows; latent keys and experts; experts alone; linear attention.
KINDS = ("llama", "gemma2", "deepseek_v3", "qwen3_moe", "qwen3_next")


def planned(folder: Path, scheme: Scheme = SCHEME) -> tuple[Plan, list[Group]]:
    goal = Goal(bits=8, candidates=(scheme, None))
    plan = job.plan(str(folder), Recipe(("rtn",), scheme), goal=goal, ids=ids())
    return plan, allocate.check(plan, goal)


def layers(model: nn.Module) -> dict[str, Any]:
    """What a model runs packed: path → class, layout, and the shapes of its tensors."""
    found: dict[str, Any] = {}
    for name, one in model.named_modules():
        if isinstance(one, (QuantLinear, PackedStack)):
            layout = getattr(one, "layout", [getattr(part, "layout", "") for part in getattr(one, "parts", [])])
            found[name] = type(one), layout, {key: (t.shape, t.dtype) for key, t in one.named_buffers()}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_a_loaded_folder(kind: str, tmp_path: Path) -> None:
    folder = tiny.make(kind, tmp_path / "model")
    plan, groups = planned(folder)
    made = standin(plan, groups, [SCHEME] * len(groups), CPU)
    recipe = Recipe(("rtn",), SCHEME)
    llmq.quantize(str(folder), tmp_path / "out", recipe, ids=ids())
    loaded = llmq.load(tmp_path / "out", device_map="cpu")
    assert layers(made.model) == layers(loaded) and layers(loaded)
    assert {name for name, _ in made.model.named_parameters()} == {name for name, _ in loaded.named_parameters()}
    with torch.inference_mode():
        logits = made.model(input_ids=tiny.tokens()).logits
    assert logits.shape == loaded(input_ids=tiny.tokens()).logits.shape and bool(logits.isfinite().all())


def test_every_weight_has_a_place(tmp_path: Path) -> None:
    plan, groups = planned(tiny.make("qwen3_moe", tmp_path / "model"))
    for group in groups:
        found = [*places(plan, group)]
        assert sum(rows * width * p.experts for p in found for rows, width in p.rows) == group.numbers
        for place in found:
            assert isinstance(plan.model.get_submodule(place.owner).get_parameter(place.parameter), nn.Parameter)
    made = standin(plan, groups, [None] * len(groups), CPU)
    assert set(made.owners.values()) == set(range(len(groups))) and not layers(made.model)


def test_weights_with_schemes_of_their_own_are_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.make("llama", tmp_path / "model")
    recipe = Recipe(("rtn",), SCHEME, overrides=(("layers.0.mlp", Scheme(8, 16)), ("layers.1.mlp", Scheme(4, 32))))
    goal = Goal(bits=8, candidates=(SCHEME, None))
    plan = job.plan(str(folder), recipe, goal=goal, ids=ids())
    groups = allocate.check(plan, goal)
    llmq.quantize(str(folder), tmp_path / "out", recipe, ids=ids())
    loaded = llmq.load(tmp_path / "out", device_map="cpu")
    # Also where blocks share memory: what differs in its scheme is not shared.
    monkeypatch.setattr(module, "cache_bytes", lambda _: 0)
    made = standin(plan, groups, [SCHEME] * len(groups), CPU)
    assert layers(made.model) == layers(loaded)
    assert not any("layers.0.mlp" in owner or "layers.1.mlp" in owner for owner in made.owners)


def test_kept_experts_run_as_in_a_loaded_folder(tmp_path: Path) -> None:
    folder = tiny.make("qwen3_moe", tmp_path / "model")
    plan, groups = planned(folder)
    made: Any = standin(plan, groups, [None] * len(groups), CPU).model
    llmq.quantize(str(folder), tmp_path / "out", Recipe(("rtn",), SCHEME, keep=("experts",)), ids=ids())
    loaded = llmq.load(tmp_path / "out", device_map="cpu")
    ways = [model.config._experts_implementation for model in (made, loaded)]
    assert "eager" not in ways, ways


def test_blocks_share_what_is_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, groups = planned(tiny.make("llama", tmp_path / "model"))
    blocks = len(plan.blocks)

    def held(made: module.Standin) -> int:
        every = (*made.model.parameters(), *made.model.buffers())
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in every}.values())

    apart = held(standin(plan, groups, [None] * len(groups), CPU))
    assert nbytes(plan, CPU) == sum(p.nbytes for p in plan.model.parameters())
    monkeypatch.setattr(module, "cache_bytes", lambda _: 0)
    assert blocks > 1 and module.apart(plan, CPU) == 1
    shared = standin(plan, groups, [None] * len(groups), CPU)
    in_block = sum(p.nbytes for p in plan.blocks[0].module.parameters())
    assert apart - held(shared) == (blocks - 1) * in_block
    assert nbytes(plan, CPU) == sum(p.nbytes for p in plan.model.parameters()) - (blocks - 1) * in_block
    packed_too = standin(plan, groups, [SCHEME] * len(groups), CPU)
    names = [name for name in layers(packed_too.model) if name.endswith("o_proj")]
    first, second = (packed_too.model.get_submodule(name) for name in names[:2])
    assert first is not second and first.qweight is second.qweight


def test_schemes_that_run_as_one_have_one_form(tmp_path: Path) -> None:
    plan, groups = planned(tiny.make("llama", tmp_path / "model"))
    five, six, eight = (
        standin(plan, groups, [scheme] * len(groups), CPU).form for scheme in (Scheme(5, 16), Scheme(6, 16), None)
    )
    assert five == six != eight


def test_the_cache_of_this_machine() -> None:
    assert 1 << 12 <= cache_bytes(CPU) <= module.LARGEST_CACHE
