"""The whole of it: what is refused at once, what is chosen, kept and gone on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llmq
from llmq import job
from llmq.allocation import allocate, memory, snapshot
from llmq.allocation.goal import Fit, Goal
from llmq.allocation.scores import Scoring, divergence
from llmq.checkpoint.files import RECIPE as FILE
from llmq.errors import LlmqError
from llmq.grids.scheme import Activations, Scheme
from llmq.machine import resident_memory
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.allocation.scores.test_walk import After, Killed
from tests.llmq.allocation.tasks import ids
from tests.llmq.refusal import refused

RECIPE = Recipe(("rtn",), Scheme(4, 16))
GOAL = Goal(bits=4.2)
IDS = ids(10)


def quantized(folder: Path, out: Path, goal: Goal = GOAL, recipe: Recipe = RECIPE) -> llmq.Report:
    return llmq.quantize(str(folder), out, recipe, goal=goal, ids=IDS)


def test_bits_are_chosen_written_proved_and_run_again(tiny_model: Path, tmp_path: Path) -> None:
    recipe = Recipe(("gptq",), Scheme(4, 16))
    report = quantized(tiny_model, tmp_path / "out", recipe=recipe)
    row = report.chosen
    assert row is not None and row.score == "divergence" and row.groups == 12 and row.goal == "4.2 bits per weight"
    assert report.bits_per_weight <= 4.2 and report.bits_per_weight == pytest.approx(row.chosen.bits)
    assert len({weight.scheme.bits for weight in report.quantized}) > 1
    truths = [one.truth for one in row.tried]
    assert all(truth is not None and truth > 0 for truth in truths) and truths == sorted(truths)  # type: ignore[type-var]
    assert row.written is not None and 0 < row.written < 3 * (row.chosen.truth or 0)
    assert llmq.Report.load(tmp_path / "out").chosen == row
    again = Recipe.load(tmp_path / "out" / FILE)
    rerun = llmq.quantize(str(tiny_model), tmp_path / "again", again, ids=IDS)
    assert [w.scheme for w in rerun.quantized] == [w.scheme for w in report.quantized] and rerun.chosen is None
    finished = quantized(tiny_model, tmp_path / "out", recipe=recipe)
    assert finished.seconds == report.seconds


def test_scores_are_used_again(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = quantized(tiny_model, tmp_path / "a")

    def never(_: Scoring) -> list[list[float]]:
        raise AssertionError("scored again")

    monkeypatch.setattr(divergence, "losses", never)
    second = quantized(tiny_model, tmp_path / "b", Goal(bits=5))
    assert first.chosen is not None and second.chosen is not None
    assert second.bits_per_weight > first.bits_per_weight
    assert second.chosen.chosen.predicted < first.chosen.chosen.predicted
    with pytest.raises(AssertionError, match="scored again"):
        quantized(tiny_model, tmp_path / "c", recipe=replace(RECIPE, options={"range": "minmax"}))


def test_a_killed_choice_goes_on_to_the_same(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "EVERY", 0.0)
    monkeypatch.setattr(snapshot, "SHARE", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    want = quantized(tiny_model, tmp_path / "want")
    for steps in (3, 5, 9, 14, 22, 40):
        out = tmp_path / f"out-{steps}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"killed-{steps}"))
        with pytest.raises(Killed):
            llmq.quantize(str(tiny_model), out, RECIPE, goal=GOAL, ids=IDS, watch=After(steps))
        found = quantized(tiny_model, out)
        assert found.recipe == want.recipe and found.chosen is not None and want.chosen is not None
        assert found.chosen.tried == want.chosen.tried and found.chosen.written == want.chosen.written
        assert (out / FILE).read_bytes() == (tmp_path / "want" / FILE).read_bytes()


def test_a_size_and_a_divergence(tiny_model: Path, tmp_path: Path) -> None:
    whole = job.plan(str(tiny_model), RECIPE, ids=IDS).budget.disk
    report = quantized(tiny_model, tmp_path / "size", Goal(nbytes=whole, prove=False))
    assert report.bytes <= whole * 1.001 and report.bytes > whole * 0.97
    assert report.chosen is not None and report.chosen.chosen.truth is None
    small = quantized(tiny_model, tmp_path / "kl", Goal(kl=0.2, score="linear"))
    assert small.chosen is not None and small.chosen.score == "linear" and small.chosen.chosen.predicted <= 0.2
    proved = [one for one in small.chosen.tried if one.truth is not None and one.truth <= 0.2]
    assert all(one.predicted <= 0.2 for one in small.chosen.tried)
    assert not proved or small.chosen.chosen.bits == min(one.bits for one in proved)
    assert quantized(tiny_model, tmp_path / "kl2", Goal(kl=0.4, score="linear")).bytes < small.bytes


@pytest.mark.parametrize("kind", ["mixtral", "gemma3_text", "granitemoe"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    tiny.make(kind, tmp_path / "m")
    recipe = replace(RECIPE, loader="llmq")
    report = quantized(tmp_path / "m", tmp_path / "out", Goal(bits=4.5), recipe)
    experts = {weight.scheme for weight in report.quantized if weight.expert is not None}
    assert len(experts) <= 1 and report.bits_per_weight <= 4.5
    assert report.chosen is not None and report.chosen.written is not None
    assert report.chosen.written == pytest.approx(report.chosen.chosen.truth, rel=0.05)


def test_what_cannot_be_is_refused_by_the_plan(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Measuring it starts a process that loads all of transformers.
    monkeypatch.setattr(memory, "own_share", lambda module: 500 << 20)

    def planned(goal: Goal, recipe: Recipe = RECIPE) -> None:
        job.plan(str(tiny_model), recipe, goal=goal, ids=IDS)

    refused(lambda: planned(Goal(bits=1.5)), "the least", "--target-bits")
    refused(lambda: planned(Goal(nbytes=1000)), "--target-size")
    refused(lambda: planned(Goal(bits=40)), "nothing to quantize")
    refused(lambda: planned(Goal(fit=Fit(1 << 40))), "nothing to quantize")
    with pytest.raises(LlmqError, match=r"the smallest that can is --fit \d+MiB"):
        planned(Goal(fit=Fit(1 << 20)))
    fp8 = Scheme(8, None, grid="fp8")
    refused(lambda: planned(Goal(fit=Fit(4 << 30), candidates=(fp8, Scheme(4, 16)))), "fp8", "--serve vllm")
    static = Scheme(8, None, activations=Activations(dynamic=False))
    refused(lambda: planned(Goal(bits=8, candidates=(static, None))), "static")
    refused(lambda: planned(Goal(bits=6, candidates=(Scheme(4, 64, grid="nf4"), Scheme(3, 16)))), "--candidates", "nf4")
    refused(lambda: planned(Goal(bits=6, candidates=(Scheme(4, 48),))), "divides", "--ragged")
    refused(lambda: planned(GOAL, replace(RECIPE, overrides=(("layers", Scheme(3, 16)),))), "no weight", "--override")
    refused(lambda: job.plan(str(tiny_model), RECIPE, goal=GOAL, ids=IDS[:1]), "--samples")
    outside = Recipe(("signround",), Scheme(4, 16))
    planned(GOAL, outside)


def test_the_plan_counts_the_memory_of_scoring(tiny_model: Path) -> None:
    plan = job.plan(str(tiny_model), RECIPE, ids=IDS)
    scored = job.plan(str(tiny_model), RECIPE, goal=GOAL, ids=IDS)
    groups = allocate.check(scored, GOAL)
    assert scored.budget.memory >= allocate.memory(scored, groups) - resident_memory() // 10 > 0
    assert plan.budget.disk == scored.budget.disk


def test_large_models_are_scored_more_cheaply(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = job.plan(str(tiny_model), RECIPE, goal=GOAL, ids=IDS)
    groups = allocate.check(plan, GOAL)
    chain = 64 * torch.float32.itemsize
    found = {}
    for room in (2**31, 36 * chain * 1024, 36 * chain * 1023, 12 * chain * 512, 12 * chain * 511):
        monkeypatch.setattr(allocate, "ROOM", room)
        found[room] = allocate.usual_score(plan, groups)
    assert [name for name, _ in found.values()] == ["divergence", "divergence", "linear", "linear", "gradient"]
    assert [tokens for _, tokens in found.values()] == [2048, 1024, 2048, 512, 2048]


def test_the_report_is_plain_data(tiny_model: Path, tmp_path: Path) -> None:
    quantized(tiny_model, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())["chosen"]
    assert data["tried"][0]["predicted"] > 0 and len(data["curve"]) > 5 and data["uniform"][0][0].startswith("2-bit")
