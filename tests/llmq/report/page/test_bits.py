"""The section on the choice of bits: every weight's bits, the curve with its points, and what was compared."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmq.discovery.reasons import Kind, Reason
from llmq.grids.scheme import Scheme
from llmq.report.bits import BitsRow, TriedRow
from llmq.report.page import report_page
from llmq.report.page.bits import HEIGHT, Curve, bits, curve, inside_map
from llmq.report.page.charts import Heat
from llmq.report.report import Report
from llmq.report.rows import WeightRow
from tests.llmq.report.page.reports import Page, chosen, kept, mixed, report

ONE = BitsRow("4 bits per weight", "error", 1, (TriedRow("only", 4.0, 0.1, None),), (), (), 1.0)


def mapped(made: Report) -> Heat:
    found = inside_map(made)
    assert found is not None
    return found


def drawn(row: BitsRow) -> Curve:
    found = curve(row)
    assert found is not None
    return found


def test_a_run_whose_schemes_were_given_has_no_such_section() -> None:
    assert bits(report(2)) is None
    page = Page(report_page(report(2)))
    assert "bits" not in page.ids and "#bits" not in page.links


def test_the_section_is_whole() -> None:
    page = Page(report_page(mixed(3)))
    assert {"bits", "bits-map", "bits-outside", "bits-curve"} <= page.ids.keys() and "#bits" in page.links
    names = [f"attn.{name}" for name in ("query", "key", "value", "out")] + [f"mlp.{n}" for n in ("gate", "up", "down")]
    assert page.plots[:9] == [*names, "head", "Size against divergence"]
    text = " ".join(page.text.split())
    assert "block 0, attn.query: 2.12 stored bits, 2-bit g128 symmetric" in text
    assert "block 0, attn.value: 16.50" not in text and "not quantized (kept by --keep)" in text
    assert "3-bit g128 symmetric for all weights: 3.12 stored bits per weight, 0.1000 nats predicted" in text


def test_a_large_page_stays_small() -> None:
    html = report_page(mixed(94, experts=128))
    assert len(html.encode()) < 1_000_000
    Page(html)


def test_every_weight_has_the_colour_of_its_bits() -> None:
    made = mixed(4)
    heat = mapped(made)
    levels = {2: 0, 3: 3, 4: 5, 8: 8}
    rows = {row.name: row for row in made.weights}
    for strip in heat.strips:
        assert [cell.at for cell in strip.cells] == [0, 1, 2, 3]
        for cell in strip.cells:
            row = rows[f"model.layers.{cell.at}.{strip.label}"]
            stored = f"{8 * row.bytes / math.prod(row.shape):.2f}"
            if isinstance(row, WeightRow):
                assert cell.level == levels[row.scheme.bits] and cell.number == f"{stored}, {row.scheme}"
            else:
                assert cell.level is None and cell.number == f"{stored}, not quantized ({row.reason})"
    assert heat.key == [
        (0, "2-bit: 7 weights"),
        (3, "3-bit: 7 weights"),
        (5, "4-bit: 7 weights"),
        (8, "8-bit: 6 weights"),
        (None, "not quantized: 2 weights"),
    ]
    assert (
        "A grid of 7 kinds of weights by 4 blocks. Quantized weights have 2.12 to 8.12 stored bits" in heat.description
    )


def test_a_kind_that_is_not_quantized_at_all_is_there_too() -> None:
    made = mixed(3)
    made.weights = [kept(row, Reason(Kind.BY_USER, "kept")) if "gate" in row.name else row for row in made.weights]
    strip = mapped(made).strips[-1]
    assert (strip.label, [cell.level for cell in strip.cells]) == ("mlp.gate", [None] * 3)
    made.weights = [kept(row, Reason(Kind.BY_USER, "kept")) for row in made.weights]
    assert mapped(made).key == [(None, "not quantized: 22 weights")]


def test_experts_are_one_cell_with_all_their_schemes() -> None:
    made = mixed(2, counts=(2, 4), experts=8)
    strip = next(strip for strip in mapped(made).strips if strip.label == "mlp.experts.*.up")
    assert strip.detail == "8 weights 1536×4096"
    assert strip.cells[0].number == "3.12, 4 × 2-bit g128 symmetric, 4 × 4-bit g128 symmetric"
    assert strip.cells[0].level in (0, 8) and "3.12 stored bits, 8 weights, 4 × " in strip.cells[0].text


def test_one_number_of_bits_has_one_colour() -> None:
    heat = mapped(mixed(2, counts=(4,)))
    assert heat.key[0] == (4, "4-bit: 13 weights")
    assert {cell.level for strip in heat.strips for cell in strip.cells} == {4, None}


def test_weights_outside_the_blocks() -> None:
    made = mixed(2)
    tower = [WeightRow(f"tower.{i}.in", (64, 64), None, 64 * 34, Scheme(4), 0.1) for i in range(3)]
    made.weights += tower
    found = bits(made)
    assert found is not None and found.outside is not None
    assert [(strip.label, len(strip.cells)) for strip in found.outside.strips] == [("head", 1), ("tower.*.in", 3)]
    assert found.outside.columns == ["1", "2", "3"] and found.outside.strips[1].cells[0].text.startswith("tower.0.in: ")
    assert found.table[1] == ["tower.0.in", "4.25", "4-bit g128 symmetric"]
    assert found.table[0] == ["head", "16.38", "not quantized (outside the decoder blocks)"]
    made.weights = [row for row in made.weights if row.block is not None]
    without = bits(made)
    assert without is not None and without.outside is None and "bits-outside" not in Page(report_page(made)).ids
    made.weights, made.blocks = list(tower), []
    assert inside_map(made) is None and "bits-map" not in Page(report_page(made)).ids


def test_what_was_compared() -> None:
    found = bits(mixed(2))
    assert found is not None and found.headings == ["choice", "stored bits", "predicted", "measured", "as written"]
    assert found.tried == [
        ["as scored", "3.10", "0.08000", "0.1000", "0.05000"],
        ["fewest bits dearer", "3.09", "0.08500", "0.1100", ""],
    ]
    assert found.told[0] == f"{chosen()}." and found.told[1] == f"O{chosen().beside[1:]}." and found.lines == []
    alone = bits(mixed(2, chosen=ONE))
    assert alone is not None and alone.tried == [["only", "4.00", "0.1000", ""]] and len(alone.told) == 2


def test_what_the_memory_is_made_of() -> None:
    lines = (("weights", 3.0 * 2**30), ("keys and values", 2.0**20))
    found = bits(mixed(1, chosen=chosen(lines=lines)))
    assert found is not None
    assert found.lines == [["weights", "3.00 GiB"], ["keys and values", "1.0 MiB"]]
    slow = mixed(1, chosen=chosen(lines=lines, milliseconds=1.5))
    text = Page(report_page(slow)).text
    assert "What the memory is made of" in text and "1.5 ms a token predicted" in text


def test_points_are_at_their_places() -> None:
    row = chosen(uniform=(("2-bit g128 symmetric", 2.0, 1.0), ("4-bit g128 symmetric", 4.0, 0.01)), curve=())
    found = drawn(replace(row, tried=(TriedRow("one", 3.0, 0.1, 0.1),), written=None))
    places = {mark.label: (mark.style, mark.x, mark.y) for mark in found.marks}
    assert places == {
        "2-bit g128": ("", 0, 0),
        "4-bit g128": ("", 100, HEIGHT),
        "chosen": ("on", 50, HEIGHT / 2),
        "measured": ("truth", 50, HEIGHT / 2),
    }
    assert found.y_ticks[0] == (HEIGHT, "0.01") and found.y_ticks[-1] == (0, "1")
    assert found.x_ticks == [(0, "2"), (50, "3"), (100, "4")] and found.line == ""
    heights = sorted(mark.label_y for mark in found.marks)
    assert all(b - a >= 14 for a, b in zip(heights, heights[1:], strict=False))
    assert {mark.label for mark in found.marks if mark.left} == {"4-bit g128"}
    assert [style for style, _ in found.key] == ["", "on", "truth"]


def test_the_curve_is_drawn_up_to_the_largest_scheme_and_its_table_has_all() -> None:
    row = chosen()
    found = drawn(row)
    assert len(found.line.split()) == 49 and row.curve[-1] == (16.0, 0.0)
    assert found.table[-1] == ["best of its size", "16.00", "0", "predicted"]
    assert len(found.table) == len(row.curve) + len(row.uniform) + 3
    assert ["the choice as written", "3.10", "0.05000", "measured"] in found.table
    assert "3.10 bits and 0.08000 nats predicted, 0.1000 measured" in found.description
    places = [tuple(map(float, point.split(","))) for point in found.line.split()]
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places) and places == sorted(places)


@pytest.mark.parametrize("written", [None, 0.05])
@pytest.mark.parametrize("truth", [None, 0.2])
def test_a_choice_alone(truth: float | None, written: float | None) -> None:
    row = replace(ONE, tried=(TriedRow("only", 4.0, 0.1, truth),), written=written)
    found = drawn(row)
    assert len(found.marks) == 1 + (truth is not None) + (written is not None) == len(found.table)
    assert len(found.y_ticks) > 1 and len(found.x_ticks) > 1
    page = Page(report_page(mixed(1, chosen=row)))
    assert page.ids["bits-curve"] == 1


@pytest.mark.parametrize("loss", [0.0, -1e-6, math.nan, math.inf])
def test_what_has_no_logarithm_is_not_drawn(loss: float) -> None:
    row = replace(ONE, tried=(TriedRow("only", 4.0, loss, None),), curve=((2.0, loss),))
    assert curve(row) is None
    assert "bits-curve" not in Page(report_page(mixed(1, chosen=row))).ids
    some = drawn(replace(row, curve=((2.0, 0.5), (3.0, loss), (4.0, 0.1))))
    assert len(some.line.split()) == 2 and some.marks == []


def test_hostile_names_are_text() -> None:
    hostile = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    row = chosen(
        goal=hostile, score=hostile, tried=(TriedRow(hostile, 3.0, 0.1, 0.2),), uniform=((hostile, 2.0, 0.3),),
        lines=((hostile, 1.0),),
    )  # fmt: skip
    made = mixed(2, chosen=row)
    made.weights.append(WeightRow(hostile, (64, 64), None, 2048, Scheme(), 0.1))
    page = Page(report_page(made))
    assert page.tags["script"] == 1 and "{{ 7 * 7 }}" in page.text
