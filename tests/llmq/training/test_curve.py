"""The drawing of the losses: an SVG that any XML reader takes, each loss at its place."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from llmq.training.curve import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Point, svg

TRAINING: list[Point] = [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]
HELD_OUT: list[Point] = [(0, 4.5), (4, 2.2)]


def parts(text: str, tag: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(text).iter() if element.tag.endswith(f"}}{tag}")]


def points(line: ElementTree.Element) -> list[Point]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_each_loss_is_where_it_belongs() -> None:
    """Steps run from 0 at the left to the last at the right, losses from the largest at the top down."""
    training, held_out = map(points, parts(svg(TRAINING, HELD_OUT), "polyline"))
    for drawn, given in ((training, TRAINING), (held_out, HELD_OUT)):
        assert len(drawn) == len(given)
        for (x, y), (step, loss) in zip(drawn, given, strict=True):
            assert x == pytest.approx(LEFT + (WIDTH - LEFT - 12) * step / 4, abs=0.06)
            assert y == pytest.approx(TOP + (HEIGHT - TOP - BOTTOM) * (4.5 - loss) / 2.5, abs=0.06)
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in parts(svg(TRAINING, HELD_OUT), "circle")]
    assert dots == held_out


def test_the_axes_say_the_first_and_last_values() -> None:
    said = [element.text for element in parts(svg(TRAINING, HELD_OUT), "text")]
    assert {"2.00", "4.50", "0", "4"} <= set(said)
    assert "training loss, nats per token" in said and "held-out loss" in said


@pytest.mark.parametrize(
    ("training", "held_out"),
    [([], []), ([(1, 2.0)], []), ([], [(0, 3.0)]), ([(1, 2.0), (2, 2.0)], [(0, 2.0)])],
    ids=["nothing", "one step", "held-out only", "no change"],
)
def test_too_little_to_scale_by_is_drawn_too(training: list[Point], held_out: list[Point]) -> None:
    lines = parts(svg(training, held_out), "polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [len(training), len(held_out)]
    for x, y in [point for line in lines for point in points(line)]:
        assert math.isfinite(x) and 0 <= x <= WIDTH and math.isfinite(y) and 0 <= y <= HEIGHT
