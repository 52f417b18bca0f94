"""What a call that must be refused says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmq.errors import LlmqError


def refused(call: Callable[[], object], *words: str) -> str:
    """The message of the LlmqError that the call raises: one line that has all these words."""
    with pytest.raises(LlmqError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message
