"""How bits were chosen: read back as it was written, compared with one scheme for all, told in a sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llmq.report.bits import BitsRow, TriedRow, read_bits
from llmq.report.report import Report
from tests.llmq.report.page.reports import chosen, mixed, report

LEAST = BitsRow("4 bits per weight", "error", 1, (TriedRow("only", 4.0, 0.1, None),), (), (), 1.0)


@pytest.mark.parametrize(
    "row", [chosen(), LEAST, chosen(lines=(("all blocks", 3.5), ("the head", 0.5)), milliseconds=4.5)]
)
def test_a_choice_is_read_back(row: BitsRow) -> None:
    made = report(1, chosen=row)
    read = Report.from_dict(json.loads(made.to_json()))
    assert read == made and read.chosen == row


def test_a_run_whose_schemes_were_given_has_none() -> None:
    assert read_bits(None) is None
    data = json.loads(report(1).to_json())
    del data["chosen"]  # a report of an earlier llmq
    assert Report.from_dict(data).chosen is None


def test_a_row_without_what_came_later_is_read() -> None:
    data = json.loads(report(1, chosen=chosen()).to_json())["chosen"]
    del data["milliseconds"]
    assert read_bits(data) == chosen()


@pytest.mark.parametrize("lacking", ["tried", "curve", "goal"])
def test_what_is_no_row_is_an_error(lacking: str) -> None:
    data = json.loads(mixed(1).to_json())["chosen"]
    del data[lacking]
    with pytest.raises((KeyError, TypeError), match=lacking):
        read_bits(data)


def test_the_same_size_is_the_largest_that_is_no_larger() -> None:
    uniform = (("a", 2.0, 0.5), ("b", 3.1, 0.2), ("c", 3.1, 0.1), ("d", 3.2, 0.05))
    row = chosen(uniform=uniform)
    assert row.chosen.bits == 3.1 and row.same == ("c", 3.1, 0.1)
    assert chosen(uniform=uniform[:1]).same == uniform[0]
    # What differs in the last digit of a sum only is as large.
    assert chosen(uniform=(("a", 3.1 + 1e-12, 0.1),)).same is not None


def test_one_scheme_for_all_in_words() -> None:
    said = "one scheme for all, at most as large: b, 3.00 stored bits per weight, 0.2000 nats predicted"
    assert chosen(uniform=(("b", 3.0, 0.2),)).beside == said
    assert chosen(uniform=(("d", 3.2, 0.2),)).beside == "no candidate for all weights is as small"
    assert LEAST.same is None and LEAST.beside == ""


def test_the_choice_in_a_sentence() -> None:
    row = chosen()
    begin = (
        "3.10 stored bits per weight for 3.1 bits per weight, 28 groups of weights; divergence 0.0800 nats predicted"
    )
    assert str(row) == f"{begin}, 0.1000 measured without corrections, 0.0500 as written"
    assert str(replace(row, written=None)) == f"{begin}, 0.1000 measured without corrections"
    assert str(row.measured(0.04)).endswith("0.0400 as written")
    assert str(LEAST).endswith("divergence 0.1000 nats predicted")
