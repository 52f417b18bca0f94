"""Times of groups and candidates: what they add up to, what is kept, and what is chosen by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import llmq
from llmq import job
from llmq.allocation import allocate, bounds
from llmq.allocation.goal import Goal, Latency
from llmq.allocation.groups import Group
from llmq.allocation.latency import table
from llmq.allocation.latency.decode import Start, Times
from llmq.allocation.latency.table import machine, step_times
from llmq.grids.scheme import Scheme
from llmq.planning.types import Plan
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent
from tests.llmq.allocation.tasks import CPU, ids
from tests.llmq.refusal import refused

CANDIDATES = (Scheme(4, 16), Scheme(8, 16), None)
RECIPE = Recipe(("rtn",), Scheme(4, 16))


class Counted(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def planned(folder: Path, candidates: tuple[Scheme | None, ...] = CANDIDATES) -> tuple[Plan, list[Group]]:
    goal = Goal(bits=8, candidates=candidates)
    plan = job.plan(str(folder), RECIPE, goal=goal, ids=ids())
    return plan, allocate.check(plan, goal)


def test_a_scheme_for_all_is_what_was_measured(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, groups = planned(tiny_model)
    steps = iter((10.0, 20.0, 30.0))

    def measured(model: Any, parts: Sequence[str], begin: Start, device: torch.device) -> Times:
        step = next(steps)
        return Times(step, dict.fromkeys(parts, step / 100))

    monkeypatch.setattr(table, "timed", measured)
    watch = Counted()
    found = step_times(plan, groups, CPU, 16, 1, watch)
    assert len(watch.told) == 3 and [len(row) for row in found] == [3] * len(groups)
    assert sorted(sum(row[c] for row in found) for c in range(3)) == pytest.approx([10, 20, 30])
    weights = [len(group.weights) for group in groups]
    assert all(row[0] > found[weights.index(1)][0] for row, n in zip(found, weights, strict=True) if n > 1)
    # Kept: nothing is measured again, nor for fewer candidates; but for other tokens.
    again, some = Counted(), planned(tiny_model, CANDIDATES[:2])
    assert step_times(plan, groups, CPU, 16, 1, again) == found and not again.told
    assert step_times(*some, CPU, 16, 1, again) == [row[:2] for row in found] and not again.told
    with pytest.raises(StopIteration):
        step_times(plan, groups, CPU, 17, 1, again)


def test_real_steps_are_timed(tiny_model: Path) -> None:
    found = step_times(*planned(tiny_model), CPU, 16, 2, Silent())
    assert all(time > 0 for row in found for time in row)
    assert machine(CPU)["threads"] == torch.get_num_threads() and table.processor()


def test_too_little_memory_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, groups = planned(tiny_model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    refused(lambda: step_times(plan, groups, CPU, 16, 1, Silent()), "--target-latency", "1.0 MiB are free", "--context")


def test_bits_are_chosen_within_a_time(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits are slow, as on a CPU without a kernel: fewer milliseconds are fewer unquantized weights, none with 8."""

    def given(_: Plan, groups: Sequence[Group], *__: Any) -> list[list[float]]:
        cost = {Scheme(4, 16): 1.0, Scheme(8, 16): 4.0, None: 2.0}
        return [[cost[scheme] for scheme in group.candidates] for group in groups]

    monkeypatch.setattr(bounds, "step_times", given)
    groups = len(planned(tiny_model)[1])
    limit = 1.25 * groups
    goal = Goal(latency=Latency(limit), candidates=CANDIDATES)
    report = llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, goal=goal, ids=ids(10))
    assert report.chosen is not None and report.chosen.milliseconds is not None
    assert 1.25 * groups - 1 < report.chosen.milliseconds <= 1.25 * groups
    assert {row.scheme.bits for row in report.quantized} == {4}
    assert "ms a token predicted" in str(report.chosen) and f"{limit:g} ms a token with" in report.chosen.goal
    assert llmq.Report.load(tmp_path / "out").chosen == report.chosen
    # Both bounds: all within the time, and within the bits.
    both = Goal(bits=7, latency=Latency(1.5 * groups), candidates=CANDIDATES)
    report = llmq.quantize(str(tiny_model), tmp_path / "both", RECIPE, goal=both, ids=ids(10))
    assert report.bits_per_weight <= 7 and (report.chosen and report.chosen.milliseconds or 99) <= 1.5 * groups
    few = Goal(latency=Latency(0.5 * groups), candidates=CANDIDATES)
    refused(
        lambda: job.plan(str(tiny_model), RECIPE, goal=few, ids=ids(10)),
        f"{groups} milliseconds of a decode step",
        "--target-latency",
    )
    monkeypatch.setattr(bounds, "step_times", lambda *_: 1 / 0)
    tiny = Goal(bits=0.5, latency=Latency(limit), candidates=CANDIDATES)
    refused(lambda: job.plan(str(tiny_model), RECIPE, goal=tiny, ids=ids(10)), "--target-bits")
    monkeypatch.setattr(bounds, "step_times", given)
    # With --max-kl: the fewest bytes within the time.
    small = Goal(kl=10.0, latency=Latency(limit), candidates=CANDIDATES)
    plan = job.plan(str(tiny_model), RECIPE, goal=small, ids=ids(10))
    chosen = allocate.choose_bits(plan, small, CPU, Silent())
    assert chosen.milliseconds == groups
    assert plan.open is not None and f"a decode step takes {groups} ms" in " ".join(plan.open.more)
