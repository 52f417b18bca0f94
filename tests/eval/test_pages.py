"""compare.html: true to the comparison, whole and safe; what was measured goes into the folders."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from llmq.checkpoint.files import REPORT
from llmq.report.measured import digits
from llmq.report.page import PAGE
from llmq_eval import intervals, scatter
from llmq_eval.comparison import Comparison, comparison
from llmq_eval.pages import compare_page, tell_folders, write
from llmq_eval.results import Measure, Results
from tests import browser
from tests.conftest import Run
from tests.llmq.report.page.reports import Page, report
from tests.llmq.report.page.test_page import HOSTILE

SIZES = {"base": (6_558_208, 16.0, 0.0), "rtn-w4": (2_475_000, 6.0, 0.045), "gptq-w4": (2_475_000, 6.0, 0.018)}
SIZES |= {"rtn-w3": (2_180_000, 5.2, 0.21), "gptq-w3": (2_180_000, 5.2, 0.098), "nf4": (2_600_000, 6.3, 0.031)}


def results(name: str, size: int, bits: float, damage: float, folder: str = "/models") -> Results:
    """A model whose windows each lose about `damage` nats, and whose answers are the base's."""
    windows, own = random.Random(0), random.Random(name)
    nats = [1.7 + 0.3 * windows.gauss(0, 1) for _ in range(100)]
    answers = [float(windows.random() < 0.6) for _ in range(100)]
    nats = [one + damage * (0.6 + 0.4 * own.gauss(0, 1)) for one in nats]
    value, low, high = intervals.mean(nats)
    assert low is not None and high is not None
    bounds = [math.exp(bound) for bound in (value, low, high)]
    made = [Measure("perplexity:demo", "perplexity", bounds[0], bounds[1], bounds[2], "", False, "demo windows", nats)]
    if damage:
        kl = [damage * (1 + 0.3 * own.gauss(0, 1)) for _ in nats]
        made.append(Measure("divergence:demo", "kl", *intervals.mean(kl), "nats", False, "demo windows", kl))
        answers[0] = 1 - answers[0]
    made.append(Measure("hellaswag", "acc", *intervals.mean(answers), "share", True, "lm-eval, 0-shot", answers))
    made.append(Measure("memory", "resident_bytes", 3e8, None, None, "bytes", False, "float32"))
    base = f"{folder}/base" if damage else None
    return Results(f"{folder}/{name}", base, size, bits, {}, {}, "0" * 16, made)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return comparison([results(name, *numbers) for name, numbers in SIZES.items()])


def test_numbers_and_verdicts(found: Comparison) -> None:
    html = compare_page(found)
    page = Page(html)
    text = " ".join(page.text.split())
    assert len(html.encode()) < 150_000 and page.tags["h1"] == 1
    for line in found.lines:
        for cell in line.cells:
            if cell.measure and line.metric in ("perplexity", "kl"):
                assert digits(cell.measure.value) in text
            if cell.to_base and cell.recovery is not None:
                assert f"{cell.recovery:.1f} %, {cell.to_base.verdict}" in text
    # One answer of a hundred is another: that is noise; a loss in nearly every window is not.
    assert html.count('class="verdict within-noise"') == 5 and html.count('class="verdict worse"') == 5


def test_the_front(found: Comparison) -> None:
    """The front, worked out here from the sizes alone: what no other beats in both."""
    kl = {name: line.value for name, one in zip(found.models, found.results, strict=True)
          if (line := one.find("divergence:demo", "kl"))} | {"base": 0.0}  # fmt: skip
    front = {
        name for name in SIZES
        if not any(SIZES[o][0] <= SIZES[name][0] and kl[o] < kl[name] for o in SIZES if o != name)
    }  # fmt: skip
    plot = scatter.pareto(found)
    assert plot is not None and {mark.name.removesuffix(" (base)") for mark in plot.marks if mark.front} == front
    assert front == {"base", "gptq-w4", "gptq-w3"}
    assert plot.line.count(",") == 3
    by = {mark.name.removesuffix(" (base)"): mark for mark in plot.marks}
    for a in SIZES:
        for b in SIZES:
            assert (by[a].x < by[b].x) == (SIZES[a][0] < SIZES[b][0])
            assert (by[a].y > by[b].y) == (kl[a] < kl[b])
    assert by["base"].y == scatter.HEIGHT and Page(compare_page(found)).plots[0] == "Size against divergence"


def test_labels_do_not_meet() -> None:
    """Twelve models of nearly one size and damage: on a phone no two labels lie on each other."""
    many = [results(f"model-{i:02}", 2_400_000 + 9000 * i, 4.0, 0.05 + 0.0004 * i) for i in range(12)]
    plot = scatter.pareto(comparison([results("base", *SIZES["base"]), *many]))
    assert plot is not None and len(plot.marks) == 13
    heights = sorted(mark.label_y for mark in plot.marks if mark.name.startswith("model"))
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 13.9
    assert min(heights) > 0 and max(heights) <= scatter.HEIGHT


def test_without_a_base_or_divergence() -> None:
    one = results("rtn-w4", *SIZES["rtn-w4"])
    page = Page(compare_page(comparison([one])))
    assert "there is no recovery" in page.text and "Size against divergence" not in page.plots


def test_hostile_names() -> None:
    name = HOSTILE.replace("/", "|")
    made = comparison([results(name, *SIZES["nf4"]), results("base", *SIZES["base"]), results("b", *SIZES["rtn-w3"])])
    page = Page(compare_page(made))
    assert page.tags["script"] == 1 and "alert(1)" in page.text


def test_folders_learn_their_numbers(tmp_path: Path) -> None:
    from llmq.report.card import model_card

    folder = tmp_path / "rtn-w4"
    folder.mkdir()
    (folder / REPORT).write_text(report(2).to_json())
    (folder / "README.md").write_text(model_card(report(2), tmp_path))
    both = [results(name, *SIZES[name], folder=str(tmp_path)) for name in ("base", "rtn-w4")]
    # The call measured perplexity alone; what was measured before is saved beside it.
    for one in both:
        one.save(tmp_path / "out")
    both = [replace(one, measures=one.measures[:1]) for one in both]
    assert tell_folders(both, tmp_path / "out") == [folder / PAGE, folder / "README.md"]
    mine, base = (one.find("perplexity:demo", "perplexity") for one in reversed(both))
    assert mine and base
    said = f"{digits(base.value)} of the base, {100 * base.value / mine.value:.1f} % kept"
    assert said in " ".join(Page((folder / PAGE).read_text()).text.split())
    card = (folder / "README.md").read_text()
    assert f"| {digits(mine.value)} |" in card and "hellaswag" in card and "286.1 MiB" in card
    assert "hellaswag" in (folder / PAGE).read_text()
    # A later call without the base still knows what was measured of it.
    tell_folders(both[1:], tmp_path / "out")
    assert said in " ".join(Page((folder / PAGE).read_text()).text.split())
    assert (folder / "README.md").read_text() == card


def test_a_card_that_cannot_be_read_is_left(tmp_path: Path) -> None:
    from llmq.report.card import model_card

    folder = tmp_path / "rtn-w4"
    folder.mkdir()
    (folder / REPORT).write_text(report(2).to_json())
    text = model_card(report(2), tmp_path).encode()
    told: list[str] = []
    made = results("rtn-w4", *SIZES["rtn-w4"], folder=str(tmp_path))
    for spoiled, written in ((b"---\nfoo: [unclosed\n" + text.removeprefix(b"---\n"), 2), (text + b"\xe9", 1)):
        (folder / "README.md").write_bytes(spoiled)
        assert len(tell_folders([made], tmp_path / "out", told.append)) == written
    assert len(told) == 1 and "numbers not added" in told[0] and "README.md" in told[0]
    assert (folder / "README.md").read_bytes() == text + b"\xe9"


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", list(browser.SIZES))
def test_in_a_browser(found: Comparison, tmp_path: Path, size: str, theme: str) -> None:
    file = tmp_path / "pages" / "compare.html"
    write(file, found)
    with browser.chromium() as chromium:
        seen = browser.look(chromium, file, size, theme, tmp_path / "shot.png")
    browser.check(seen, file, size)
    assert [title for title, *_ in seen.plots] == Page(file.read_text()).plots
    assert len(seen.plots) == 1 + 3 * len(SIZES) - 1  # the base has no divergence from itself


def test_the_command_writes_the_page(tmp_path: Path, llmq: Run) -> None:
    files = [results(name, *SIZES[name]).save(tmp_path) for name in ("base", "gptq-w4", "rtn-w3")]
    done = llmq("compare", *files, "--html", tmp_path / "here" / "compare.html")
    assert done.returncode == 0, done.stderr
    assert "gptq-w4" in Page((tmp_path / "here" / "compare.html").read_text()).text
    done = llmq("compare", *files, "--html", files[0] / "compare.html")
    assert done.returncode == 2 and "cannot be written" in " ".join(done.stderr.split())
