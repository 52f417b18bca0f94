"""Measured numbers in words: digits, units, intervals, and what is left of the base's quality."""

from __future__ import annotations

import pytest

from llmq.report.measured import digits, interval, recovery, rows, value
from tests.llmq.report.page.reports import measure


def test_recovery() -> None:
    low, high = measure("p", "perplexity", 5.5), measure("h", "acc", 0.6, better=True)
    assert recovery(low, measure("p", "perplexity", 5.0)) == pytest.approx(100 * 5 / 5.5)
    assert recovery(high, measure("h", "acc", 0.8)) == pytest.approx(75)
    assert recovery(measure("divergence:demo", "kl", 0.1), measure("divergence:demo", "kl", 0.2)) is None
    assert recovery(measure("m", "bytes", 3, better=None), measure("m", "bytes", 3)) is None
    other = measure("p", "perplexity", 5.0, protocol="other windows")
    assert rows([low], [other])[0].base == ""  # never beside a number of another protocol


@pytest.mark.parametrize(
    ("number", "significant", "words"),
    [
        (0, 4, "0"),
        (12.3456, 4, "12.35"),
        (1234.5, 4, "1234"),
        (12345.6, 4, "12,346"),
        (0.012345, 4, "0.01235"),
        (0.5, 3, "0.500"),
        (0.00001234, 4, "1.234e-05"),
        (-12345678, 4, "-12,345,678"),
        (100, 3, "100"),
    ],
)
def test_digits(number: float, significant: int, words: str) -> None:
    assert digits(number, significant) == words


@pytest.mark.parametrize("number", [3.14159e-4, 0.271828, 6.02214, 99.6, 1234.56, 98765.4])
def test_digits_are_right_to_half_of_the_last(number: float) -> None:
    for significant in (2, 3, 4):
        found = float(digits(number, significant).replace(",", ""))
        assert abs(found / number - 1) <= 0.5001 * 10.0 ** (1 - significant)


@pytest.mark.parametrize(
    ("number", "unit", "words"),
    [
        (float("nan"), "bytes", "not a number"),
        (3 * 2**20, "bytes", "3.0 MiB"),
        (0.12345, "share", "12.35 %"),
        (5.5, "", "5.500"),
        (12.0, "tokens/s", "12.00 tokens/s"),
    ],
)
def test_a_value_with_its_unit(number: float, unit: str, words: str) -> None:
    assert value(number, unit) == words


def test_an_interval_has_its_unit_once() -> None:
    assert interval(measure("a", "b", 1.0, low=0.5, high=0.75, unit="share")) == "50.00 – 75.00 %"
    assert interval(measure("a", "b", 1.0, low=2**20, high=2**30, unit="bytes")) == "1.0 MiB – 1.00 GiB"
    assert interval(measure("a", "b", 1.0, low=1.0, high=2.0)) == "1.000 – 2.000"
    assert interval(measure("a", "b", 1.0, low=None, high=2.0)) == "" == interval(measure("a", "b", 1.0, high=None))


def test_a_measure_taken_in_two_ways_is_numbered_by_protocol() -> None:
    measures = [
        measure("perplexity:demo", "perplexity", 5.0, protocol="short"),
        measure("perplexity:demo", "perplexity", 4.0, protocol="long"),
        measure("hellaswag", "acc", 0.5, "share", True, protocol="long"),
    ]
    made = rows(measures, [measure("perplexity:demo", "perplexity", 3.0, protocol="long")])
    assert [(row.task, row.number) for row in made] == [
        ("perplexity:demo [1]", 1),
        ("perplexity:demo [2]", 2),
        ("hellaswag", 2),
    ]
    assert [(row.base, row.recovery) for row in made] == [("", ""), ("3.000", "75.0 %"), ("", "")]


def test_there_is_no_share_of_nothing() -> None:
    zero = measure("h", "acc", 0.0, better=True)
    assert recovery(measure("h", "acc", 0.5, better=True), zero) is None
    assert recovery(zero, measure("h", "acc", 0.5, better=True)) == 0.0
    assert recovery(measure("l", "log", -2.0, better=True), measure("l", "log", -1.0, better=True)) is None
    assert recovery(measure("speed:demo", "tokens", 2.0, better=True), measure("speed:demo", "tokens", 1.0)) is None
