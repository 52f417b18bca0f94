"""What a run did, in words: the headline, the worst weights, what was left, undone or fell back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from llmq.block.attempt import Outcome
from llmq.machine import size
from llmq.recipe.recipe import Recipe
from llmq.report.measured import digits, rows
from llmq.report.page import story
from tests.llmq.report.page.reports import measure, noted, report


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (4.2, "4.2 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (206, "3 min 26 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (18480, "5 h 8 min"),
    ],
)
def test_a_duration_as_people_say_it(seconds: float, words: str) -> None:
    assert story.duration(seconds) == words


def test_the_title_is_the_folder_s_name() -> None:
    assert story.title(report(1, out="/data/name-w4")) == "name-w4" and story.title(report(1, out="/")) == "/"


def test_the_headline() -> None:
    made = report(4, bytes=2**30, source_bytes=4 * 2**30, seconds=400.0)
    figures = {one.name: (one.value, one.detail) for one in story.headline(made)}
    assert figures == {
        "Size": ("1.00 GiB", "4.00 times smaller than 4.00 GiB"),
        "Bits per weight": ("4.12", "4.60 whole model"),
        "Peak memory": ("5.00 GiB", "6.00 GiB predicted"),
        "Time": ("6 min 40 s", "1 min 40 s per block"),
    }


def test_the_first_perplexity_is_in_the_headline() -> None:
    mine = [measure("hellaswag", "acc", 0.5, "share", True), measure("perplexity:demo", "perplexity", 5.0)]
    alone = [one for one in story.headline(report(1), rows(mine)) if one.name == "Perplexity"]
    assert [(one.value, one.detail) for one in alone] == [("5.000", "perplexity:demo")]
    beside = story.headline(report(1), rows(mine, [measure("perplexity:demo", "perplexity", 4.0)]))
    assert [one.detail for one in beside if one.name == "Perplexity"] == ["4.000 of the base, 80.0 % kept"]
    assert [one.name for one in beside][2] == "Perplexity"


def test_a_run_without_blocks_has_a_time_of_its_own_only() -> None:
    assert story.headline(report(1, weights=[], blocks=[], seconds=3.0))[-1] == story.Figure("Time", "3.0 s", "")


def test_the_worst_weights_come_first_and_kept_ones_not() -> None:
    made = report(10)
    made.weights.insert(0, replace(made.quantized[0], error=0.0))  # the least of all
    found = story.worst(made)
    errors = sorted((row.error for row in made.quantized), reverse=True)
    assert [row[3] for row in found] == [digits(error, 3) for error in errors[: story.WORST]]
    assert found[0][1] in ("4096×4096", "14336×4096") and found[0][2] == "4.12"  # 33/64 bytes of 8 bits


def test_what_was_tried_and_undone() -> None:
    made = report(3)
    assert story.tried(made) == (6, 3)
    (group,) = story.undone(made)
    assert (group.what, group.detail, group.more) == ("awq, one pair of weights", "3", 0)
    name, words = group.items[0]
    before = made.blocks[0].log[0].before
    assert name == "model.layers.0" and words.startswith(f"awq: norm → query, key: error {before:.4f} → ")
    pair, whole = made.blocks[1].log
    made.blocks[1] = replace(made.blocks[1], log=(pair, replace(whole, outcome=Outcome.UNDONE)))
    assert [group.what for group in story.undone(made)] == ["awq, one pair of weights", "AWQ, whole block"]


def test_what_did_not_go_the_usual_way_by_what_happened() -> None:
    made = report(2)
    made.weights[:2] = [noted(row, "rounded plainly") for row in made.weights[:2]]
    groups = story.notes(made)
    assert [(group.what, group.detail) for group in groups] == [("rounded plainly", "2"), ("damped 10 times more", "1")]
    assert groups[1].items == [("model.layers.0.attn.out", "")]


def test_what_was_left_alone_by_the_reason_with_its_size() -> None:
    made = report(2)
    groups = {group.what: group for group in story.left(made)}
    kept = made.weights[2]
    assert groups["kept by --keep"].detail == f"1, {size(kept.bytes)}"
    assert groups["kept by --keep"].items == [(kept.name, f"4096×4096, {size(kept.bytes)}")]
    assert groups["outside the decoder blocks"].detail == "1, 256.0 MiB"


def test_a_long_group_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "NAMES", 2)
    made = report(1)
    made.weights = [noted(row, "the same") for row in made.quantized]
    (group,) = story.notes(made)
    assert (len(group.items), group.more, group.detail) == (2, len(made.weights) - 2, str(len(made.weights)))


def test_the_recipe_is_read_back() -> None:
    recipe = Recipe(("awq", "gptq"), keep=("é",))
    text = story.recipe(report(1, recipe=recipe.to_dict()))
    assert Recipe.from_dict(yaml.safe_load(text)) == recipe and "é" in text
