"""What an error says in one line."""

from __future__ import annotations

import pytest

from llmq.errors import LlmqError, first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one way\ntwo"), "one way"),
        (ValueError("\n\n  one way: \ntwo"), "one way"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),  # one word alone says nothing
        (LlmqError("name"), "name"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_the_first_line_or_the_kind(error: BaseException, said: str) -> None:
    assert first_line(error) == said
