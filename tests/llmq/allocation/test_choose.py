"""From losses to bits, and from bits to a recipe that is written, read and run again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmq import job
from llmq.allocation.choose import Allocation, Bound, allocate, curve, recipe_of, views
from llmq.allocation.groups import Group, groups_of
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.allocation.tasks import CANDIDATES, ids
from tests.llmq.refusal import refused

RECIPE = Recipe(("rtn",), Scheme(4, 16))


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    folder = tiny.make("llama", tmp_path_factory.mktemp("m") / "m")
    plan = job.plan(str(folder), RECIPE, ids=ids())
    return groups_of(plan.weights, RECIPE, CANDIDATES, plan.dtype)


def losses(groups: list[Group], weight: float = 1.0) -> list[list[float]]:
    return [
        [weight * (g + 1) * (4.0**-s.bits if s else 0.0) for s in group.candidates] for g, group in enumerate(groups)
    ]


def stored(groups: list[Group], limit: float) -> Bound:
    return Bound(
        "stored bytes", [group.nbytes for group in groups], limit, "give more --target-bits, or other --candidates"
    )


def test_more_bytes_never_lose_more(groups: list[Group]) -> None:
    least, most = (sum(group.nbytes[c] for group in groups) for c in (0, -1))
    found = [allocate(groups, losses(groups), [stored(groups, n)]) for n in (least, least * 1.5, least * 2.5, most)]
    assert [one.predicted for one in found] == sorted((one.predicted for one in found), reverse=True)
    assert found[0].picks == (0,) * len(groups) and found[-1].predicted == 0
    for one, limit in zip(found, (least, least * 1.5, least * 2.5, most), strict=True):
        assert one.nbytes(groups) == one.costs[0] <= limit


def test_the_fewest_bytes_for_a_divergence(groups: list[Group]) -> None:
    everything = stored(groups, math.inf)
    one = allocate(groups, losses(groups), [everything], 0.05)
    assert one.predicted <= 0.05
    less = allocate(groups, losses(groups), [stored(groups, one.nbytes(groups) - 1)])
    assert less.predicted > 0.05
    some = [[x + 1 for x in row] for row in losses(groups)]
    refused(lambda: allocate(groups, some, [everything], 0.05), "--max-kl 0.05", "the least", "--candidates")


def test_two_bounds_hold_at_once(groups: list[Group]) -> None:
    times = [[5.0 - c for c in range(len(group.candidates))] for group in groups]
    half = sum(group.nbytes[3] for group in groups)
    bounds = [stored(groups, half), Bound("milliseconds", times, 3.0 * len(groups), "allow more --target-latency")]
    one = allocate(groups, losses(groups), bounds)
    assert one.costs[0] <= half and one.costs[1] <= 3.0 * len(groups)
    tight = [
        stored(groups, sum(g.nbytes[0] for g in groups)),
        Bound("milliseconds", times, len(groups) * 2.0, "slower"),
    ]
    refused(lambda: allocate(groups, losses(groups), tight), "at once", "--target-bits")


def test_what_cannot_be_met_says_what_can(groups: list[Group]) -> None:
    least = sum(group.nbytes[0] for group in groups)
    refused(
        lambda: allocate(groups, losses(groups), [stored(groups, 10)]), f"{least:,.6g}", "--target-bits", "--candidates"
    )


def test_the_curve_falls(groups: list[Group]) -> None:
    points = curve(groups, losses(groups), 12)
    assert 5 < len(points) <= 24
    assert [b for b, _ in points] == sorted(b for b, _ in points)
    assert [x for _, x in points] == sorted((x for _, x in points), reverse=True)
    assert points[0][0] >= 2 and points[-1] == (pytest.approx(32), 0.0)


def test_views_change_what_the_smallest_costs(groups: list[Group]) -> None:
    found = views(groups, losses(groups), losses(groups, 2.0))
    plain, dearer, linear = found.values()
    assert plain == losses(groups) and linear == losses(groups, 2.0)
    assert [row[0] for row in dearer] == pytest.approx([1.5 * row[0] for row in plain])
    assert [row[1:] for row in dearer] == [row[1:] for row in plain]


def test_the_recipe_gives_every_weight_its_scheme(groups: list[Group], tmp_path: Path) -> None:
    picks = tuple(g % 5 for g in range(len(groups)))
    recipe = recipe_of(RECIPE, groups, Allocation(picks, 0.0))
    assert recipe.to_dict() == Recipe.from_dict(recipe.to_dict()).to_dict()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    plan = job.plan(str(tiny.make("llama", tmp_path / "m")), recipe, ids=ids())
    schemes = {item.name: item.scheme for item in plan.weights}
    for group, c in zip(groups, picks, strict=True):
        assert {schemes[weight.name] for weight in group.weights} == {group.candidates[c]}
    refused(lambda: recipe_of(RECIPE, groups, Allocation((4,) * len(groups), 0.0)), "as they are")


def test_overrides_of_the_user_stay_and_win(groups: list[Group]) -> None:
    own = (("down_proj", Scheme(8, 16)),)
    recipe = recipe_of(Recipe(("rtn",), Scheme(4, 16), own), groups, Allocation((0, 1, 2, 3) * 4, 0.0))
    assert recipe.overrides[-1:] == own


def test_the_experts_scheme_is_the_recipes(tmp_path: Path) -> None:
    plan = job.plan(str(tiny.make("mixtral", tmp_path / "m")), RECIPE, ids=ids())
    found = groups_of(plan.weights, RECIPE, CANDIDATES, plan.dtype)
    recipe = recipe_of(RECIPE, found, Allocation(tuple(1 if group.experts else 2 for group in found), 0.0))
    assert recipe.scheme == Scheme(3, 16)
    assert not [name for name, _ in recipe.overrides if "experts" in name]
