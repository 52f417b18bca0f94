"""What people read of an attempt, whichever parts of it are there."""

from __future__ import annotations

import pytest

from llmq.block.attempt import Attempt, Outcome
from tests.llmq.block.attempts import LOG


def test_attempts_in_words() -> None:
    assert list(map(str, LOG)) == [
        "awq: norm → first, second: error 0.5000 → 0.4000",
        "awq: up → down: error 0.4000 (no scale tried was better than none)",
        "AWQ: error 0.3000 → 0.2000",
        "SignRound: no weight here can be refined",
    ]
    assert [attempt.whole for attempt in LOG] == [False, False, True, True]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (Attempt("awq", None, None, None, Outcome.SKIPPED), "awq: skipped"),
        (Attempt("awq", "a → b", None, None, Outcome.UNDONE), "awq: a → b: undone"),
        (Attempt("awq", "a → b", None, 0.5, Outcome.KEPT, why="as told"), "awq: a → b: as told"),
        (Attempt("awq", None, 0.0, 0.0, Outcome.UNDONE), "awq: error 0.0000 → 0.0000"),
        (Attempt("awq", None, 0.12345, 0.1, Outcome.KEPT, why="as told"), "awq: error 0.1235 → 0.1000 (as told)"),
        (Attempt("awq", "", 0.5, 0.4, Outcome.KEPT, "α 1"), "awq: : error 0.5000 → 0.4000"),
    ],
)
def test_what_is_there_is_said(attempt: Attempt, words: str) -> None:
    """An error of 0 is an error, and a place without a name is a place."""
    assert str(attempt) == words
    assert attempt.whole is (attempt.where is None)


def test_outcomes_are_written_as_words() -> None:
    assert [str(outcome) for outcome in Outcome] == ["kept", "undone", "skipped"]
    assert [Outcome(word) for word in ("kept", "undone", "skipped")] == list(Outcome)
