"""What an error says in one line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from llmq.errors import LlmqError, first_line


class Part(BaseModel):
    count: int


class Settings(BaseModel):
    parts: list[Part | None]


def invalid(values: Any) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    return caught.value


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
        (invalid({"parts": [{"count": None}]}), "parts.0.count: Input should be a valid integer"),
        (invalid(5), "Input should be a valid dictionary or instance of Settings"),
    ],
)
def test_the_first_line_or_the_kind(error: BaseException, said: str) -> None:
    assert first_line(error) == said
