"""The figures of a run: strips in the order of the block, means of experts, what is known along the depth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmq.discovery.reasons import Kind, Reason
from llmq.report.measured import digits
from llmq.report.page import figures
from tests.llmq.report.page.reports import kept, report


def test_a_strip_for_each_kind_of_weight_and_a_cell_for_each_block() -> None:
    made = report(3)
    heat = figures.heat(made)
    assert heat is not None and heat.columns == ["block 0", "block 1", "block 2"]
    names = ["attn.query", "attn.key", "attn.value", "attn.out", "mlp.gate", "mlp.up", "mlp.down"]
    assert [strip.label for strip in heat.strips] == names
    errors = {row.name: row.error for row in made.quantized}
    for strip in heat.strips:
        for cell in strip.cells:
            name = f"model.layers.{cell.at}.{strip.label}"
            assert cell.number == (digits(errors[name], 3) if name in errors else "not quantized")
            assert (cell.level is None) == (name not in errors)
    largest = max(errors, key=lambda name: errors[name])
    said = f"{digits(errors[largest], 3)} ({largest.split('.', 3)[3]} in block {largest.split('.')[2]})"
    assert f"The largest error is {said}" in heat.description
    assert heat.strips[0].detail == "4096×4096 4-bit"


def test_the_colours_follow_the_errors() -> None:
    heat = figures.heat(report(6))
    assert heat is not None
    cells = [cell for strip in heat.strips for cell in strip.cells if cell.level is not None]
    ordered = sorted(cells, key=lambda cell: float(cell.number))
    assert [cell.level for cell in ordered] == sorted(cell.level for cell in ordered if cell.level is not None)
    assert (ordered[0].level, ordered[-1].level) == (0, 8) and len(heat.steps) == 9


def test_many_kinds_that_differ_in_a_number_are_one_strip() -> None:
    few, many = figures.heat(report(2, experts=4)), figures.heat(report(2, experts=64))
    assert few is not None and many is not None
    assert len(few.strips) == 16 and len(many.strips) == 7
    strip = next(strip for strip in many.strips if strip.label == "mlp.experts.*.up")
    assert strip.detail == "64 weights 1536×4096 4-bit" and "mean of 64, largest" in strip.cells[0].text


def test_experts_that_are_known_as_such_are_one_strip_however_few() -> None:
    heat = figures.heat(report(2, experts=4, routed=True))
    assert heat is not None
    names = [f"attn.{n}" for n in ("query", "key", "value", "out")] + [
        f"mlp.experts.*.{n}" for n in ("gate", "up", "down")
    ]
    assert [strip.label for strip in heat.strips] == names


def test_a_run_that_quantized_nothing_has_no_heat_map() -> None:
    made = report(2)
    made.weights = [kept(row, Reason(Kind.BY_USER, "kept")) for row in made.weights]
    assert figures.heat(made) is None


def test_the_depth_has_what_each_block_would_have_been_before() -> None:
    made = report(3)
    plot = figures.depth(made)
    assert plot is not None and [series.name for series in plot.series] == ["before the methods' changes", "as written"]
    for row, block in zip(plot.table, made.blocks, strict=True):
        assert row[1:] == [digits(block.log[1].before, 3), digits(block.error, 3)]
    # One pair of weights: no judgement of the whole block.
    made.blocks = [replace(block, log=block.log[:1]) for block in made.blocks]
    alone = figures.depth(made)
    assert alone is not None and [series.name for series in alone.series] == ["as written"]


def test_an_error_that_is_not_finite_is_not_the_largest() -> None:
    made = report(3)
    made.blocks = [replace(b, error=e) for b, e in zip(made.blocks, (math.nan, 0.1, 0.2), strict=True)]
    plot = figures.depth(made)
    assert plot is not None and "largest in block 2" in plot.description


def test_seconds_are_summed() -> None:
    made = report(2)
    made.blocks = [replace(b, seconds=s) for b, s in zip(made.blocks, (10.0, 30.0), strict=True)]
    plot = figures.seconds(made)
    assert plot is not None and "40.0 in all; the shortest took 10.0, the longest 30.0" in plot.description


def test_memory_in_the_unit_of_its_size() -> None:
    made = report(2)
    plot = figures.memory(made)
    assert plot is not None and [row[1:] for row in plot.table] == [["6.00 GiB", "4.00 GiB", "3.00 GiB"]] * 2
    small = report(2, peak_memory=300 * 2**20, predicted_memory=400 * 2**20)
    small.blocks = [replace(block, memory=100 * 2**20, peak=200 * 2**20) for block in small.blocks]
    plot = figures.memory(small)
    assert plot is not None and plot.table[0][1:] == ["400 MiB", "200 MiB", "100 MiB"]
    small.blocks[0] = replace(small.blocks[0], memory=None)
    plot = figures.memory(small)
    assert plot is not None and plot.table[0][3] == ""


def test_a_gpu_s_memory_where_there_was_one() -> None:
    made = report(2)
    assert figures.device(made) is None
    made.blocks[1] = replace(made.blocks[1], device=3 * 2**29)
    plot = figures.device(made)
    assert plot is not None and [row[1] for row in plot.table] == ["", "1.50 GiB"]
    made.predicted_device_memory = 2**31
    plot = figures.device(made)
    assert plot is not None and plot.headings[1:] == ["predicted", "most in the block"]


@pytest.mark.parametrize("figure", [figures.depth, figures.seconds, figures.memory, figures.device])
def test_a_run_without_blocks_has_no_figures_along_them(figure: object) -> None:
    assert figure(report(1, weights=[], blocks=[])) is None  # type: ignore[operator]
