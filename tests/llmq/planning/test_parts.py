"""Experts that are parts of a block's parameters in a plan: every stored matrix once, in its place, in groups."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import job
from llmq.discovery.reasons import Kind
from llmq.discovery.view import View
from llmq.grids.scheme import Activations, Scheme
from llmq.methods import make
from llmq.planning import budget as planning
from llmq.planning import parts
from llmq.planning.memory import Budget, Load, predict
from llmq.planning.parts import group_parts
from llmq.planning.plan import Plan
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.planning.made import item
from tests.llmq.refusal import refused

W4 = mixtures.W4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of four experts and two identity experts, stored one by one; do not change it."""
    return mixtures.write("longcat_flash", tmp_path_factory.mktemp("models") / "m", num_layers=2)


def plan(folder: Path, scheme: Scheme = W4, method: str = "gptq", **more: Any) -> Plan:
    recipe = Recipe(methods=tuple(method.split("+")), scheme=scheme, **more)
    return job.plan(str(folder), recipe, ids=tiny.tokens(4, 32, seed=2))


def test_every_expert_of_the_checkpoint_is_planned_once_with_its_place(source: Path) -> None:
    made = plan(source)
    stored = mixtures.stored(source)
    mine = [i for i in made.weights if i.expert is not None]
    # Those of identity experts too: transformers wants as many of them packed as its parameter has entries.
    assert sorted(i.tensor for i in mine) == sorted(n for n in stored if re.search(r"experts\.\d", n))
    model, _ = mixtures.load(source)
    for i in mine:
        assert i.view is not None and i.expert == i.view.index and f".experts.{i.expert}." in i.tensor
        assert torch.equal(i.view.get(model.get_submodule(f"model.layers.{i.block}")), stored[i.tensor])
        assert i.row_parallel is ("down_proj" in i.tensor)
    for block in made.blocks:
        assert block.experts is None and block.parts is not None
        assert block.parts.parameters == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        assert not block.parts.weights.keys() & block.weights.keys()
        by_input: dict[int, set[str]] = {}
        for weight in (*block.weights.values(), *block.parts.weights.values()):
            by_input.setdefault(weight.input_id, set()).add(weight.tensor)
        inputs = [names for names in by_input.values() if any(".experts." in name for name in names)]
        assert len(inputs) == 6 + 4 and all(len({n.split(".")[5] for n in names}) == 1 for names in inputs)
        assert all(len(names) == (1 if "down_proj" in next(iter(names)) else 2) for names in inputs)


@pytest.mark.parametrize("share", [1, 2, 10**9])
def test_groups_hold_every_weight_once(share: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHARE", share)
    for block in plan(source).blocks:
        assert block.parts is not None
        found = [block.parts.of(group) for group in block.parts.groups]
        assert sorted(name for weights in found for name in weights) == sorted(block.parts.weights)
        assert len(block.parts.weights) == 6 * 2 + 4
        assert block.units == [*(group.unit for group in block.parts.groups), f"block {block.index}"]
        if share == 10**9:
            assert [group.unit for group in block.parts.groups] == [
                f"block {block.index}, expert {e}" for e in range(6)
            ]


def weights(experts: int, width: int = 64, after: int = 100) -> list[WeightPlan]:
    return [
        replace(item(f"x.{e}.{n}", (width, width), W4, expert=e, view=View(n, e), input_id=2 * e + i), after=after)
        for e in range(experts)
        for i, n in enumerate(("a", "b"))
    ]


@pytest.mark.parametrize(("statistics", "sizes"), [(0, [8]), (5000, [4, 4]), (12_000, [3, 3, 2]), (10**6, [1] * 8)])
def test_a_group_takes_at_most_half_of_the_memory_of_the_experts(statistics: int, sizes: list[int]) -> None:
    """16 matrices of 64 × 64 in bfloat16 are 131,072 bytes; an expert's codes are 8192."""
    made = group_parts(0, weights(8), torch.bfloat16, lambda one: statistics * len(one) // 2)
    assert made is not None and [group.end - group.begin for group in made.groups] == sizes
    assert all(n * (statistics + 8192) <= 131_072 // 2 or n == 1 for n in sizes)


def test_without_experts_there_is_no_plan() -> None:
    assert group_parts(0, [], torch.float32, lambda _: 0) is None
    kept = [replace(i, scheme=None) for i in weights(2)]
    assert group_parts(0, kept, torch.float32, lambda _: 0) is None


def test_experts_of_different_schemes_are_refused(source: Path) -> None:
    override = (("re:experts\\.4\\.", Scheme(8, 16)),)
    refused(lambda: plan(source, overrides=override), "experts with different schemes", "experts.4.gate_proj 8-bit")


def test_widths_that_the_group_size_does_not_divide(source: Path, tmp_path: Path) -> None:
    """One group size for all experts: it divides the width of every stack."""
    model = mixtures.write("longcat_flash", tmp_path / "m", num_layers=1, expert_ffn_hidden_size=48)
    refused(lambda: plan(model, Scheme(4, 32)), "does not divide the width of", "experts.*.down_proj [64, 48]")
    made = plan(model, Scheme(4, 32), ragged="smaller")
    assert {i.scheme for i in made.weights if i.expert is not None} == {Scheme(4, 16)}
    made = plan(model, Scheme(4, 32), ragged="keep")
    left = {i.reason.kind for i in made.weights if ".mlp.experts" in i.name and i.reason is not None}
    assert left == {Kind.INDIVISIBLE} and made.blocks[0].parts is None


@pytest.mark.parametrize("share", [2, 10**9])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_memory_of_a_block_and_one_group(
    share: int, method: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Load] = []

    def note(*args: Any, **kwargs: Any) -> Budget:
        loads.extend(next(a for a in args if isinstance(a, list) and isinstance(a[0], Load)))
        return predict(*args, **kwargs)

    monkeypatch.setattr(planning, "predict", note)
    monkeypatch.setattr(parts, "SHARE", share)
    options = {"correct": "none"} if method == "gptq" else {}
    made, quantizer = plan(source, method=method, options=options), make(Recipe(methods=(method,))).quantizer
    for block, load in zip(made.blocks, loads, strict=True):
        assert load.block == sum(p.numel() for p in block.module.parameters()) * 4
        assert block.parts is not None
        groups = [block.parts.of(group).values() for group in block.parts.groups]
        rest = sum(w.after for w in block.weights.values())
        assert load.packed == rest
        most = max(quantizer.workspace(w.shape) for w in block.parts.weights.values())
        others = max(quantizer.workspace(w.shape) for w in block.weights.values())
        # Before they are packed there are codes of all weights, and one float32 weight twice.
        sizes = [prod(w.shape) for w in block.weights.values()]
        own = {w.input_id: 4 * w.shape[1] ** 2 for w in block.weights.values()} if method == "gptq" else {}
        others = max(others, sum(sizes) + 4 * max(sizes) - rest - sum(own.values()))
        assert load.workspace == max(others, most + max(sum(prod(w.shape) for w in group) for group in groups))
        widths = [{w.input_id: w.shape[1] for w in group}.values() for group in [block.weights.values(), *groups]]
        hessians = max(sum(4 * n * n for n in group) for group in widths)
        assert load.statistics == (hessians if method == "gptq" else 0)
        # Each token chooses two experts, one of which may be none in the run that shows it.
        assert load.forward == 2.5 * made.ids.numel() * 64 * 4 + 2**28


def test_static_scales_of_inputs_are_refused(tmp_path: Path) -> None:
    """An expert that no token chose has no inputs to find one by."""
    scheme = Scheme(8, None, activations=Activations(dynamic=False))
    model = mixtures.write("jetmoe", tmp_path / "m")
    refused(lambda: plan(model, scheme, "rtn", loader="llmq"), "static scales need inputs of every expert", "--keep ")
    dynamic = plan(model, Scheme(8, None, activations=Activations()), "rtn", loader="llmq")
    assert any(i.expert is not None and i.scheme is not None for i in dynamic.weights)
