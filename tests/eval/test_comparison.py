"""Intervals and tests against scipy.stats, and what a comparison says of results that are known beforehand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llmq.errors import LlmqError
from llmq.report.measured import recovery
from llmq_eval import intervals, tables
from llmq_eval.comparison import Comparison, comparison
from llmq_eval.results import Measure, Results
from llmq_eval.store import collect
from llmq_eval.subject import Subject
from tests.conftest import Run

RANDOM = np.random.default_rng(0)
BASE = RANDOM.normal(2.0, 0.3, 40)


def results(name: str, size: int, samples: np.ndarray, right: np.ndarray, kl: np.ndarray | None) -> Results:
    value = float(np.exp(samples.mean()))
    measures = [
        Measure("perplexity:demo", "perplexity", value, 1.0, 2.0, "", False, "text", samples.tolist()),
        Measure("piqa", "acc", float(right.mean()), 0.1, 0.9, "share", True, "piqa", right.astype(float).tolist()),
    ]
    if kl is not None:
        measures.append(Measure("divergence:demo", "kl", float(kl.mean()), 0.0, 1.0, "nats", False, "kl", kl.tolist()))
    base = None if kl is None else "/models/base"
    return Results(f"/models/{name}", base, size, 4.0, {"llmq": "1"}, {"cpu": "x"}, f"{name}0123", measures)


@pytest.fixture
def five() -> list[Results]:
    right = RANDOM.random(200) < 0.7
    worse = right & (RANDOM.random(200) < 0.6)
    noise = RANDOM.normal(0, 0.05, 40)
    noise -= noise.mean()
    return [
        results("good", 50, BASE + 0.01, right, np.full(40, 0.01) + noise / 50),
        results("same", 50, BASE + 0.01 + noise, right, np.full(40, 0.0101) + noise / 10),
        results("bad", 40, BASE + 0.2, worse, np.full(40, 0.2) + noise),
        results("large", 90, BASE + 0.3, worse, np.full(40, 0.3) + noise),
        results("base", 100, BASE, right, None),
    ]


def test_intervals_as_scipy_has_them() -> None:
    values = RANDOM.normal(3, 2, 17).tolist()
    centre, low, high = intervals.mean(values)
    expected = stats.t.interval(0.95, 16, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected) and centre == pytest.approx(np.mean(values))
    for hits in (0, 3, 20):
        wilson = stats.binomtest(hits, 20).proportion_ci(method="wilson")
        assert intervals.share(hits, 20) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    assert intervals.mean([1.0]) == (1.0, None, None)


def test_median_interval_covers_it() -> None:
    assert intervals.median([5, 1, 4, 2, 3]) == (3.0, None, None)
    assert intervals.median([7, 1, 5, 2, 4, 3]) == (3.5, 1, 7)
    draws = np.random.default_rng(1).exponential(size=(2000, 15))
    inside = [low <= np.log(2) <= high for row in draws for _, low, high in [intervals.median(row.tolist())]]  # type: ignore[operator]
    assert 0.95 <= np.mean(inside) <= 0.975


def test_paired_tests_as_scipy_has_them() -> None:
    first, second = RANDOM.normal(0, 1, 30), RANDOM.normal(0.4, 1, 30)
    found = intervals.paired(first.tolist(), second.tolist())
    expected = stats.ttest_rel(first, second)
    low, high = expected.confidence_interval(0.95)
    assert found is not None and found.name == "paired t"
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))
    one, other = RANDOM.random(60) < 0.8, RANDOM.random(60) < 0.6
    exact = intervals.paired(one.astype(float).tolist(), other.astype(float).tolist())
    gained, lost = int((one & ~other).sum()), int((~one & other).sum())
    assert exact is not None and exact.name == "exact McNemar"
    assert exact.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)


def test_holm() -> None:
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.5]) == [1.0, 1.0]


def by_pair(found: Comparison, task: str) -> dict[tuple[str, str], str]:
    return {(found.models[c.first], found.models[c.second]): c.verdict for c in found.contrasts if c.task == task}


def test_what_is_noise_and_what_is_not(five: list[Results]) -> None:
    found = comparison(five)
    assert found.base == 0 and found.models == ("base", "good", "same", "bad", "large")
    perplexity = by_pair(found, "perplexity:demo")
    assert perplexity["good", "same"] == "within noise"
    assert perplexity["bad", "base"] == "worse" and perplexity["bad", "large"] == "better"
    # So small a loss in every window alike is no noise, though its interval is far inside that of either value.
    assert perplexity["good", "base"] == "worse"
    assert by_pair(found, "piqa") == {
        ("good", "base"): "within noise",
        ("same", "base"): "within noise",
        ("bad", "base"): "worse",
        ("large", "base"): "worse",
        ("good", "same"): "within noise",
        ("good", "bad"): "better",
        ("good", "large"): "better",
        ("same", "bad"): "better",
        ("same", "large"): "better",
        ("bad", "large"): "within noise",
    }
    line = found.lines[0]
    assert line.cells[0].recovery == pytest.approx(100) and line.cells[3].recovery == pytest.approx(100 / np.exp(0.2))
    bad = line.cells[3].to_base
    assert bad is not None and bad.difference == pytest.approx(np.exp(BASE.mean() + 0.2) - np.exp(BASE.mean()))
    assert bad.low is not None and bad.high is not None and bad.low <= bad.difference <= bad.high


def test_pareto_front(five: list[Results]) -> None:
    found = comparison(five)
    front = {found.models[point.model] for point in found.pareto if point.front}
    assert {found.models[point.model] for point in found.pareto} == set(found.models)
    assert front == {"bad", "good", "base"}


def test_other_protocols_are_not_compared(five: list[Results]) -> None:
    first = five[0].measures[0]
    five[0].measures[0] = replace(first, protocol="another window")
    found = comparison(five)
    assert any("perplexity:demo perplexity was measured by different protocols" in note for note in found.notes)
    assert all("good" not in names for names in by_pair(found, "perplexity:demo"))
    assert found.lines[0].cells[1].recovery is None


def test_each_protocol_has_its_line(five: list[Results], tmp_path: Path) -> None:
    """A model that was measured again by another window keeps both numbers, and the pairs are of one protocol."""
    again = replace(five[0].measures[0], protocol="another window", value=9.0)
    five[0] = five[0].with_measures([again])
    assert five[0].find("perplexity:demo", "perplexity", "another window") == again
    assert Results.load(five[0].save(tmp_path)).measures == five[0].measures
    found = comparison(five)
    lines = [line for line in found.lines if line.metric == "perplexity"]
    assert [line.title for line in lines] == [
        f"perplexity:demo [{1 + found.protocols.index(p)}]" for p in ("text", "another window")
    ]
    assert all(cell.measure for cell in lines[0].cells)
    assert [cell.measure for cell in lines[1].cells] == [None, again, None, None, None]
    assert {one.protocol for one in found.contrasts if one.metric == "perplexity"} == {"text"}
    assert "perplexity:demo [1] ↓ |" in tables.markdown(found) and "- [1] text" in tables.markdown(found)
    newer = replace(again, value=8.0)
    assert five[0].with_measures([newer]).measures == [*five[0].measures[:-1], newer]


def test_what_is_not_finite(five: list[Results]) -> None:
    """A model that overflowed is neither on the front nor better than any other."""
    for number in (0, 2):
        broken = five[2].measures[number]
        five[2].measures[number] = replace(broken, value=np.nan, samples=[np.nan, *(broken.samples or [])[1:]])
    found = comparison(five)
    assert "bad" not in {found.models[point.model] for point in found.pareto}
    assert not any("bad" in names for names in by_pair(found, "perplexity:demo"))
    assert by_pair(found, "perplexity:demo")["good", "same"] == "within noise"
    assert tables.ranks(found)[0].endswith("? bad")
    assert found.lines[0].cells[found.models.index("bad")].recovery is None


def test_recovery_without_a_test(five: list[Results]) -> None:
    """A number without samples cannot be tested, but what is kept of the base can be said."""
    for one in five:
        one.measures[1] = replace(one.measures[1], samples=None)
    found = comparison(five)
    kept = found.lines[1].cells[4].recovery
    assert found.lines[1].cells[4].to_base is None and kept is not None
    row = next(line for line in tables.markdown(found).splitlines() if line.startswith("| piqa"))
    assert f" {kept:.1f} %" in row and row.count("%") == 9  # the base beside itself is not in %
    zero = replace(five[0].measures[1], value=0.0)
    assert recovery(zero, five[4].measures[1]) == 0 and recovery(five[4].measures[1], zero) is None
    assert recovery(replace(zero, protocol="other"), five[4].measures[1]) is None


def test_losses_are_told_from_the_models_own_base(five: list[Results]) -> None:
    """A base that is not there is no reason to take another's."""
    five[0] = replace(five[0], base="/models/elsewhere")
    found = comparison(five)
    assert found.base == 0 and found.models[1] == "good"
    assert any("good has another base (/models/elsewhere)" in note for note in found.notes)
    for line in found.lines:
        assert line.cells[1].recovery is None and line.cells[1].to_base is None
        assert line.metric == "kl" or line.cells[2].to_base is not None
    pairs = by_pair(found, "perplexity:demo")
    assert ("good", "base") not in pairs and pairs["good", "bad"] == "better"
    assert not any("good" in names for names in by_pair(found, "divergence:demo"))
    assert "good" not in {found.models[point.model] for point in found.pareto}
    without = comparison(five[:4])
    assert without.base is None and not without.pareto
    assert any("different bases (/models/base, /models/elsewhere)" in note for note in without.notes)


def test_tables(five: list[Results]) -> None:
    found = comparison(five)
    text = tables.markdown(found)
    assert "| base (base) | good |" in text and "≈" in text and "▼" in text and "no other is both smaller" in text
    assert any("good ≈ same > bad > large" in line for line in tables.ranks(found))
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(found))))
    assert len(rows) == 14
    row = next(row for row in rows if (row["model"], row["metric"]) == ("good", "kl"))
    kl = five[0].find("divergence:demo", "kl")
    assert kl is not None and float(row["value"]) == kl.value
    pairs = list(csv.DictReader(io.StringIO(tables.comma_separated(found, pairs=True))))
    assert len(pairs) == len(found.contrasts) == 26


def test_results_come_back_as_they_were(five: list[Results], tmp_path: Path) -> None:
    measures = [replace(five[0].measures[0], value=float("inf"), low=None), *five[0].measures[1:]]
    file = replace(five[0], measures=measures).save(tmp_path)
    back = Results.load(file)
    assert back.measures[1:] == five[0].measures[1:] and np.isnan(back.measures[0].value)
    for one in five:
        one.save(tmp_path)
    assert {one.model for one in collect([str(tmp_path)], tmp_path)} == {one.model for one in five}
    alone = collect([str(five[0].path(tmp_path))], tmp_path)
    assert [one.name for one in alone] == ["good", "base"]


def test_compare_on_the_command_line(tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run) -> None:
    out = tmp_path / "out"
    short = ("--text", text_file, "--window", 32, "--max-windows", 3, "--out", out)
    done = llmq("compare", tiny_model, "--out", out)
    assert done.returncode == 2 and "run `llmq eval" in done.stderr
    assert llmq("eval", tiny_model, "--base", tiny_model, *short).returncode == 0
    for place in (tiny_model, out, next((out / "results").iterdir())):
        done = llmq("compare", place, "--out", out, "--format", "csv")
        assert done.returncode == 0, done.stderr
        assert [row["metric"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["perplexity"]
    done = llmq("compare", out, "--format", "pdf")
    assert done.returncode == 2 and "table, markdown, csv" in done.stderr


@pytest.mark.slow
def test_broken_results(tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run) -> None:
    """One file that was cut off hides no others; who names it is told what to do."""
    out = tmp_path / "out"
    command = ("eval", tiny_model, "--text", text_file, "--window", 32, "--max-windows", 3, "--out", out)
    assert llmq(*command).returncode == 0
    (whole,) = (out / "results").iterdir()
    text = whole.read_text()
    (out / "results" / "broken.json").write_text(text[:99])
    for place in (tiny_model, out, whole):
        done = llmq("compare", place, "--out", out, "--format", "csv")
        assert done.returncode == 0 and ("skipped:" in done.stderr) == (place != whole), done.stderr
        assert [row["metric"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["perplexity"]
    wrong = [text.replace(old, new) for old, new in (('"format": 1', '"format": 0'), ('"value": ', '"value": "x'))]
    nothing = json.dumps(json.loads(text) | {"bytes": None})
    for broken in ("{}", text[:99], *wrong, nothing, json.dumps(json.loads(text) | {"measures": [7]})):
        (tmp_path / "broken.json").write_text(broken)
        done = llmq("compare", tmp_path / "broken.json")
        assert done.returncode == 2 and done.stderr.endswith("remove it, or run `llmq eval` again\n")
    whole.write_text(text[:99])
    done = llmq(*command)
    assert done.returncode == 0 and "it is replaced" in done.stderr
    assert whole.read_text() == text


def test_nothing_to_compare() -> None:
    with pytest.raises(LlmqError, match="run `llmq eval` first"):
        comparison([])


def test_a_divergence_is_from_its_own_base(five: list[Results]) -> None:
    """KL from one base is not shown in a table of another."""
    for one in five[:2]:
        one.measures[2] = replace(one.measures[2], base="/models/other", protocol="kl from other")
    for one in five[2:4]:
        one.measures[2] = replace(one.measures[2], base="/models/base", protocol="kl from base")
    found = comparison(five)
    assert {found.models[point.model] for point in found.pareto} == {"bad", "large", "base"}
    assert [line.protocol for line in found.lines if line.metric == "kl"] == ["kl from other", "kl from base"]
    assert not comparison([*five[:2], five[4]]).pareto
    # One that was held against another base later on still has its divergence from the first.
    five[2] = replace(five[2], base="/models/other")
    found = comparison(five[2:])
    assert {found.models[point.model] for point in found.pareto} == {"bad", "large", "base"}
    assert by_pair(found, "divergence:demo") == {("bad", "large"): "better"}
    assert ("bad", "base") not in by_pair(found, "perplexity:demo")


def test_what_two_processes_measured_is_kept(five: list[Results], tmp_path: Path) -> None:
    first, second = (replace(five[0], measures=[measure]) for measure in five[0].measures[:2])
    first.keep(tmp_path)
    assert second.keep(tmp_path).measures == five[0].measures[:2]
    assert Results.load(first.path(tmp_path)).measures == five[0].measures[:2]
    again = replace(first.measures[0], value=1.0)
    assert replace(first, measures=[again]).keep(tmp_path).measures == [again, second.measures[0]]  # in its place
    other = first.path(tmp_path).read_text().replace('"format": 1', '"format": 2')
    first.path(tmp_path).write_text(other)
    with pytest.raises(LlmqError, match="another version of llmq"):
        first.keep(tmp_path)
    assert first.path(tmp_path).read_text() == other
    first.path(tmp_path).write_text("[" * 100_000)
    told: list[str] = []
    assert first.keep(tmp_path, told.append).measures == first.measures and "it is replaced" in told[0]


def test_which_results_are_meant(five: list[Results], tiny_model: Path, tmp_path: Path) -> None:
    """By place, else by the files; what was in a place before and after, if both are named; what is gone."""
    import shutil

    out = tmp_path / "out"
    one, other = (Path(shutil.copytree(tiny_model, tmp_path / name / "m")) for name in ("a", "b"))
    measured = {
        folder: replace(five[0], model=str(folder), base=None, fingerprint=Subject.of(str(folder)).fingerprint)
        for folder in (one, other)
    }
    files = [each.save(out) for each in measured.values()]
    assert len(set(files)) == 2  # the same files under the same name in two places
    assert [each.model for each in collect([str(one), str(other)], out)] == [str(one), str(other)]
    one.rename(tmp_path / "moved")
    told: list[str] = []
    moved = collect([str(tmp_path / "moved")], out, told.append)
    assert [each.fingerprint for each in moved] == [measured[one].fingerprint] and "has the files" in told[0]
    assert [each.model for each in collect([str(one)], out)] == [str(one)]
    before = replace(measured[other], fingerprint="0" * 16)
    files += [before.save(out)]
    assert len(collect([str(files[1]), str(files[2])], out)) == 2
    assert len(collect([str(out)], out)) == 2


def test_ends_where_plus_and_minus_would_mislead() -> None:
    def shown(value: float, low: float, high: float) -> str:
        return tables.shown(Measure("piqa", "acc", value, low, high, "share", True, ""))

    assert shown(0.5, 0.4, 0.6) == "50.00 % ± 10"
    assert shown(0.0, 0.0, 0.24) == "0.00 % (0 … 24)"
    assert tables.shown(Measure("p", "perplexity", 54.0, 1.0, 10900.0, "", False, "")) == "54.0000 (1 … 1.09e+04)"
