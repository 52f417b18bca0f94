"""A goal's bounds as costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import llmq
from llmq import job
from llmq.allocation import allocate
from llmq.allocation.bounds import bounds_of, rest_bytes
from llmq.allocation.choose import Allocation, recipe_of
from llmq.allocation.goal import Goal
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent
from tests.llmq.allocation.tasks import ids

RECIPE = Recipe(("rtn",), Scheme(4, 16), (("o_proj", Scheme(8, 16)),), ("layers.0.mlp",))


def test_bounds_on_bytes(tiny_model: Path) -> None:
    plan = job.plan(str(tiny_model), RECIPE, goal=Goal(bits=6), ids=ids())
    groups = allocate.check(plan, Goal(bits=6))
    found = bounds_of(plan, Goal(bits=6), groups, Silent())
    (bits,) = found.bounds
    assert not found.posts and not found.more and found.times is None
    assert bits.limit * 8 == 6 * sum(group.numbers for group in groups) and bits.costs[0] == groups[0].nbytes
    (free,) = bounds_of(plan, Goal(kl=0.1), groups, Silent()).bounds
    assert free.limit == math.inf
    (size,) = bounds_of(plan, Goal(nbytes=10**6), groups, Silent()).bounds
    assert size.limit == 10**6 - rest_bytes(plan, groups)


def test_the_rest_and_the_chosen_are_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    plan = job.plan(str(tiny_model), RECIPE, goal=Goal(bits=6), ids=ids())
    groups = allocate.check(plan, Goal(bits=6))
    one = Allocation(tuple(g % 4 for g in range(len(groups))), 0.0)
    report = llmq.quantize(str(tiny_model), tmp_path / "out", replace(recipe_of(RECIPE, groups, one)), ids=ids())
    assert report.bytes == rest_bytes(plan, groups) + one.nbytes(groups)
