"""What is drawn: steps of the colour scale, ticks, and every value at its place in percent of the plot."""

from __future__ import annotations

import math

import pytest

from llmq.report.page.charts import LEVELS, Cell, Given, Heat, Label, Scale, Strip, decades, free, plot, ticks


@pytest.mark.parametrize("top", [0.0123, 0.1, 1.0, 7.3, 80, 99.9, 1234])
def test_ticks_are_round_and_cover(top: float) -> None:
    found = ticks(top)
    assert found[0] == 0 and top <= found[-1] * (1 + 1e-9) and found[-2] < top and 3 <= len(found) <= 6
    assert all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in found)


@pytest.mark.parametrize("values", [[0.1, 0.12, 0.2], [1e-3, 0.01, 0.5]])
def test_levels_agree_with_the_edges(values: list[float]) -> None:
    scale = Scale(values)
    edges = scale.edges()
    assert edges[0] == pytest.approx(min(values)) and edges[-1] == pytest.approx(max(values))
    for value in [*values, *(0.5 * (a + b) for a, b in zip(edges, edges[1:], strict=False))]:
        level = scale.level(value)
        assert edges[level] <= value * (1 + 1e-9) and value <= edges[level + 1] * (1 + 1e-9)
    assert {scale.level(min(values)), scale.level(max(values))} == {0, LEVELS - 1}


@pytest.mark.parametrize("top", [0.0, -1.0, math.nan, math.inf])
def test_ticks_of_nothing(top: float) -> None:
    assert ticks(top) == [0.0, 1.0]


def test_a_scale_of_one_value_or_none_has_one_step() -> None:
    assert Scale([0.5, 0.5]).level(0.5) == 0
    assert (Scale([]).low, Scale([]).high, Scale([]).log) == (0.0, 1.0, False)


def test_a_scale_is_even_in_the_logarithm_where_values_are_far_apart() -> None:
    assert not Scale([1.0, 3.0]).log and Scale([1.0, 3.1]).log
    far = Scale([1.0, 1000.0, 0.0, math.inf, math.nan])
    assert far.edges()[3] == pytest.approx(10.0) and (far.low, far.high) == (1.0, 1000.0)
    assert [far.level(v) for v in (0.0, 0.5, math.inf, 2000.0)] == [0, 0, LEVELS - 1, LEVELS - 1]


def words(number: float) -> str:
    return f"{number:g} x"


def test_every_value_is_at_its_place() -> None:
    """In percent: the middle of the place from the left, what lacks to the highest tick from the top."""
    made = plot("id", "T", "D", ["a", "b", "c", "d"], [Given("one", "line", [4.0, 1.0, None, 2.0])], words)
    (series,) = made.series
    assert made.ticks == [(100, "0 x"), (75, "1 x"), (50, "2 x"), (25, "3 x"), (0, "4 x")]
    assert series.parts == ["12.5,0 37.5,75", "87.5,50"] and series.dots == [(12.5, 0), (37.5, 75), (87.5, 50)]
    assert series.bars == [] and (made.first, made.last) == ("a", "d")
    assert made.columns[1] == (25, 25, "b: one 1 x") and made.columns[2][2] == "c: not known"


def test_bars_stand_around_the_middle_of_their_place() -> None:
    made = plot("id", "T", "D", ["a", "b"], [Given("one", "bars", [1.0, math.inf], bars=True)], words)
    (series,) = made.series
    assert series.bars == [(25 - 0.36 * 50, 0, 36)] and not series.parts and not series.dots


def test_the_table_has_the_same_numbers() -> None:
    given = [Given("one", "line", [1.0, None]), Given("two", "before", [3.0, 4.0])]
    made = plot("id", "T", "D", ["a", "b"], given, words, column="place", caption="C", tick=lambda v: f"{v:.1f}")
    assert made.headings == ["place", "one", "two"] and made.caption == "C"
    assert made.table == [["a", "1 x", "3 x"], ["b", "", "4 x"]]
    assert made.columns[0][2] == "a: one 1 x, two 3 x" and made.ticks[0] == (100, "0.0")


def test_a_plot_of_one_place_and_of_none() -> None:
    one = plot("id", "T", "D", ["a"], [Given("one", "line", [0.0])], words)
    assert (one.first, one.last) == ("a", "") and one.series[0].parts == ["50,100"]
    none = plot("id", "T", "D", [], [Given("one", "line", [])], words)
    assert (none.first, none.columns, none.table) == ("", [], [])


def test_a_heat_map_as_a_table() -> None:
    strips = [Strip("up", "", [Cell(0, 3, "t", "0.1"), Cell(2, None, "t", "left alone")]), Strip("down", "", [])]
    heat = Heat("id", "T", "D", ["b0", "b1", "b2"], strips, [])
    assert heat.rows == [["b0", "0.1", ""], ["b1", "", ""], ["b2", "left alone", ""]]
    assert heat.left and not Heat("id", "T", "D", [], [Strip("up", "", [Cell(0, 3, "t", "")])], []).left


@pytest.mark.parametrize("values", [[0.1], [0.013, 0.9], [1e-5, 3.0], [2.0, 4.0]])
def test_decades_cover_the_values(values: list[float]) -> None:
    found = decades(values)
    assert found[0] <= min(values) and max(values) <= found[-1] and found == sorted(set(found))
    assert all(f"{mark:e}"[0] in "125" for mark in found)
    assert len(found) <= 7 or all(f"{mark:e}"[0] == "1" for mark in found[1:-1])


def test_labels_keep_clear_of_those_that_are_there() -> None:
    first = free(50, 100, "a name", False, [], 300)
    assert first == Label(50, 104, "a name", False)
    second = free(52, 100, "a name", False, [first], 300)
    assert abs(second.y - first.y) >= 14
    # On the other side of the point, and at the other end, there is room.
    assert free(49, 100, "a name", True, [first], 300).y == 104 and free(0, 100, "x", False, [first], 300).y == 104
    assert free(50, 0, "a name", False, [], 300).y == 10
