"""The experts on a page: a table of quantiles, and a point for every expert at its tokens and its error."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace

import pytest

from llmq.report.experts import experts_of
from llmq.report.measured import digits
from llmq.report.page import report_page
from llmq.report.page.charts import HEIGHT, WIDTH
from llmq.report.page.experts import across, clouds
from llmq.report.rows import WeightRow
from tests.llmq.report.page.reports import Page, report


def points(path: str) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h0", path)]


def test_a_row_of_quantiles_for_each_block() -> None:
    made = report(3, experts=8, routed=True)
    map = clouds(experts_of(made))
    assert map is not None and len(map.table) == 3
    assert map.headings[4:] == ["error: median", "90 %", "largest", "tokens: fewest", "median", "most", "without",
                                "routing kept"]  # fmt: skip
    errors = sorted(row.error for row in made.quantized if row.block == 1 and row.expert is not None)
    shares = [digits(errors[i], 3) for i in (11, 21, 23)]
    routing = f"{100 * (made.blocks[1].routing or 0):.2f} %"
    assert map.table[1] == ["block 1", "8", "24", "4.12", *shares, "0", "6", "14", "1", routing]
    largest = max(row.error for row in made.quantized if row.expert is not None)
    assert digits(largest, 3) in map.description and "No token chose 3 of the 24 experts." in map.description


def test_a_point_stands_at_its_tokens_and_its_error() -> None:
    made = report(2, experts=8, routed=True)
    found = experts_of(made)
    map = clouds(found)
    assert map is not None
    errors = [error for experts in found for _, error in experts.each]
    for strip, experts in zip(map.strips, found, strict=True):
        expected = [
            (
                round(WIDTH * math.log(1 + (tokens or 0)) / math.log(15)),
                round(HEIGHT * (max(errors) - error) / (max(errors) - min(errors))),
            )
            for tokens, error in experts.each
        ]
        assert points(strip.marked) == expected[:1] and points(strip.dots) == expected[1:]
    assert [text for _, text in map.ticks] == ["0", "14"] and (map.low, map.high) == (
        digits(min(errors), 3),
        digits(max(errors), 3),
    )


@pytest.mark.parametrize(("most", "texts"), [(14, "0 14"), (45516, "0 10 100 1,000 10,000 45,516"), (0, "0")])
def test_an_axis_of_tokens_ends_with_the_largest_number(most: int, texts: str) -> None:
    made = report(1, experts=2, routed=True)
    made.weights = [replace(r, tokens=most) if isinstance(r, WeightRow) and r.expert else r for r in made.weights]
    map = clouds(experts_of(made))
    assert map is not None and " ".join(text for _, text in map.ticks) == texts
    assert [x for x, _ in map.ticks] == sorted(x for x, _ in map.ticks)
    assert across(0, most) == 0 and across(most, most) == (1 if most else 0)


def test_errors_that_are_equal_or_not_finite_have_a_place() -> None:
    made = report(1, experts=3, routed=True)
    same = [replace(row, error=0.5) if isinstance(row, WeightRow) else row for row in made.weights]
    made.weights = same
    level = clouds(experts_of(made))
    assert level is not None and [y for _, y in points(level.strips[0].dots)] == [50, 50]
    made.weights = [replace(r, error=math.nan) if isinstance(r, WeightRow) and r.expert == 2 else r for r in same]
    broken = clouds(experts_of(made))
    assert broken is not None and [y for _, y in points(broken.strips[0].dots)] == [50, 0]
    assert "not a number" in broken.description or "nan" in broken.description


def test_a_report_without_tokens_has_the_table_only() -> None:
    assert clouds(experts_of(report(2, experts=4))) is None
    made = report(2, experts=4, routed=True)
    made.weights = [replace(r, tokens=None) if isinstance(r, WeightRow) else r for r in made.weights]
    made.blocks = [replace(block, routing=None) for block in made.blocks]
    map = clouds(experts_of(made))
    assert map is not None and map.strips == [] and map.headings[-1] == "largest" and len(map.table[0]) == 7
    page = Page(report_page(made))
    assert "Error and tokens of every expert" not in page.text and "block 1" not in page.plots


def test_a_page_has_a_section_of_experts_if_there_are_any() -> None:
    page = Page(report_page(report(3, experts=8, routed=True)))
    assert [title for title in page.plots if title.startswith("block ")] == ["block 0", "block 1", "block 2"]
    assert "Error and tokens of every expert" in page.text and "#experts" in page.links
    assert [title for title in page.plots if "experts" in title] == [
        f"mlp.experts.*.{n}" for n in ("gate", "up", "down")
    ]
    plain = Page(report_page(report(3)))
    assert "#experts" not in plain.links and "Routing kept" not in plain.text


@pytest.mark.slow
def test_a_page_of_44544_weights_of_experts_is_small() -> None:
    made = report(58, experts=256, routed=True)
    assert sum(row.expert is not None for row in made.quantized) == 44544
    began = time.perf_counter()
    html = report_page(made)
    assert time.perf_counter() - began < 20  # 0.7 s on an idle machine
    assert len(html.encode()) < 500_000
    assert len(Page(html).plots) == 4 + 3 + 58 + 3
