"""What an error says in one line."""

from __future__ import annotations

import pytest

from llmq.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n  one  \ntwo"), "one  "),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (KeyError("name"), "'name'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_the_first_line_or_the_kind(error: BaseException, said: str) -> None:
    assert first_line(error) == said
