"""What becomes of each weight: whom patterns mean, groups that do not fit, and why a weight is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmq.checkpoint.source import FolderSource, shapes
from llmq.discovery import blocks as discover
from llmq.discovery.names import Links, link
from llmq.discovery.reasons import Kind
from llmq.grids.scheme import Scheme
from llmq.planning.weights import WeightPlan, matches, plan_weights
from llmq.recipe.recipe import Recipe
from tests.conftest import write_tiny_model
from tests.llmq.planning.made import ANY, make, scheme_of
from tests.llmq.refusal import refused


@pytest.mark.parametrize(
    ("ragged", "scheme"), [("smaller", Scheme(4, None)), ("channel", Scheme(4, None)), ("keep", None)]
)
def test_ragged(ragged: str, scheme: Scheme | None, ragged_model: Path) -> None:
    plan = make(ragged_model, ragged=ragged)
    assert scheme_of(plan) == scheme
    assert scheme_of(plan, "model.layers.1.mlp.up_proj") == Scheme(4, 32)


def test_ragged_takes_the_largest_divisor(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", intermediate_size=144)
    assert scheme_of(make(model, group=64, ragged="smaller")) == Scheme(4, 48)


def test_override_and_keep(tiny_model: Path) -> None:
    plan = make(tiny_model, overrides=(("down_proj", Scheme(8, 64)),), keep=("re:layers\\.0\\.",))
    assert scheme_of(plan) == Scheme(8, 64)
    assert all(i.scheme is None and "--keep" in str(i.reason) and i.by_user for i in plan.weights if i.block == 0)
    assert not [w for w in plan.warnings if "share an input" in w]


def test_a_weight_left_alone_has_a_kind_of_reason(ragged_model: Path) -> None:
    plan = make(ragged_model, ragged="keep", keep=("o_proj",))
    kinds: dict[Kind, set[str]] = {}
    for item in plan.weights:
        assert (item.scheme is None) == (item.reason is not None)
        if item.reason is not None:
            kinds.setdefault(item.reason.kind, set()).add(item.name.rpartition(".")[2])
    assert kinds == {
        Kind.BY_USER: {"o_proj"},
        Kind.INDIVISIBLE: {"down_proj"},
        Kind.OUTSIDE: {"embed_tokens", "lm_head"},
    }
    # What the user leaves alone may be overridden in vain; what cannot be quantized may not.
    assert make(ragged_model, ragged="keep", keep=("o_proj",), overrides=(("o_proj", Scheme(8, 32)),))
    refused(
        lambda: make(ragged_model, ragged="keep", overrides=(("lm_head", Scheme(8, 32)),)), "only weights that are not"
    )


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("down_proj", ANY, True),
        ("mlp.down_proj", ANY, True),
        ("own_proj", ANY, False),
        ("layers.1", ANY, True),
        ("layers.1", "model.layers.11.mlp.down_proj", False),
        ("*down*", ANY, True),
        ("down*", ANY, False),
        (r"re:layers\.[0-1]\.", ANY, True),
        (r"re:^layers", ANY, False),
    ],
)
def test_patterns(pattern: str, name: str, hit: bool) -> None:
    assert matches(pattern, name) is hit


def found(folder: Path, recipe: Recipe, change: str = "") -> dict[str, WeightPlan]:
    """The weights of a folder by name. change: 'stored' takes a tensor of a weight away, 'converted' says why."""
    source, model = FolderSource(folder), discover.build(folder, torch.float32, False)
    links, name = link(model, shapes(source)), f"{ANY}.weight"
    if change:
        links.source.pop(name)
    if change == "converted":
        links.failed[name] = "it is converted"
    if change == "unused":
        links.unused += [name, "model.norm.weight"]
    items = plan_weights(source, recipe, model, discover.find(model), links, torch.float32)
    return {item.name: item for item in items}


def test_sizes_are_those_of_the_tensors_before_and_after(tiny_model: Path) -> None:
    """4-bit codes eight to an int32, a float32 scale for each group, the shape in two int64."""
    item = found(tiny_model, Recipe(scheme=Scheme(4, 32)))[ANY]
    assert item.shape == (64, 128) and item.before == 64 * 128 * 4
    assert item.after == 64 * 128 // 2 + 64 * (128 // 32) * 4 + 16
    assert (item.block, item.module, item.tensor) == (1, ANY, f"{ANY}.weight") and item.row_parallel


def test_the_last_override_that_means_a_weight_counts_and_keep_above_all(tiny_model: Path) -> None:
    two, eight = Scheme(2, 32), Scheme(8, 32)
    items = found(tiny_model, Recipe(scheme=Scheme(4, 32), overrides=(("mlp", two), ("down_proj", eight))))
    assert items[ANY].scheme == eight and items[ANY.replace("down", "up")].scheme == two
    assert items["model.layers.1.self_attn.q_proj"].scheme == Scheme(4, 32)
    items = found(tiny_model, Recipe(keep=("down_proj",), overrides=(("down_proj", eight),)))
    assert items[ANY].scheme is None and items[ANY].by_user and items[ANY].after == items[ANY].before


def test_a_ragged_width_keeps_its_scheme_where_the_plan_is_to_refuse(ragged_model: Path) -> None:
    assert found(ragged_model, Recipe(scheme=Scheme(4, 32)))[ANY].scheme == Scheme(4, 32)
    # Where a folder has one scheme there is no smaller group to go to.
    nf4 = Scheme(4, 64, grid="nf4")
    assert found(ragged_model, Recipe(methods=("rtn",), scheme=nf4, ragged="smaller"))[ANY].scheme == nf4
    kept = found(ragged_model, Recipe(methods=("rtn",), scheme=nf4, ragged="keep"))[ANY]
    assert str(kept.reason) == "group size 64 does not divide its width 172" and not kept.by_user


@pytest.mark.parametrize(("width", "group", "smaller"), [(48, 32, 24), (40, 32, 20), (80, 64, 40), (32, 20, 16)])
def test_a_smaller_group_is_the_largest_that_divides(width: int, group: int, smaller: int, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", layers=1, intermediate_size=width)
    items = found(model, Recipe(methods=("rtn",), scheme=Scheme(8, group), ragged="smaller"))
    scheme = items["model.layers.0.mlp.down_proj"].scheme
    assert scheme is not None and scheme.group_size == smaller


@pytest.mark.parametrize(
    ("change", "sentence"),
    [("stored", "the checkpoint has no tensor for it"), ("converted", "it is converted")],
)
def test_a_weight_without_a_tensor_is_left_alone_for_that(change: str, sentence: str, tiny_model: Path) -> None:
    item = found(tiny_model, Recipe(), change)[ANY]
    assert item.scheme is None and item.reason is not None and item.block == 1
    assert (item.reason.kind, item.reason.sentence) == (Kind.NOT_STORED, sentence)
    assert item.before == item.after == 64 * 128 * 4


def test_a_tensor_that_the_model_has_not_is_told_of_where_it_has_two_axes(tiny_model: Path) -> None:
    source, model = FolderSource(tiny_model), discover.build(tiny_model, torch.float32, False)
    links = link(model, shapes(source))
    links.unused += ["lm_head.weight", "model.norm.weight"]
    links.source.pop("lm_head.weight")
    only = Links(links.source, unused=links.unused)
    items = plan_weights(source, Recipe(), nn.Module(), discover.Structure("", []), only, torch.float32)
    assert [(item.name, item.shape, item.block) for item in items] == [("lm_head", (256, 64), None)]
    assert items[0].reason is not None and items[0].reason.kind is Kind.NOT_LOADED
