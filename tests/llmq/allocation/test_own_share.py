"""The measurement of an empty process, and what is said if it fails."""

from __future__ import annotations

import pytest

from llmq.allocation import own_share
from llmq.errors import LlmqError

MIB = 1 << 20


@pytest.mark.slow
def test_an_empty_process_is_measured_once() -> None:
    took = own_share.own_share("transformers.models.auto")
    assert 200 * MIB < took < 2000 * MIB
    assert own_share.own_share("transformers.models.auto") == took


def test_an_empty_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_share, "_MEASURE", "raise MemoryError('no room')")
    own_share.own_share.cache_clear()
    with pytest.raises(LlmqError, match="no room"):
        own_share.own_share("torch")
    monkeypatch.setattr(own_share, "_MEASURE", "import sys; print('noise'); print(len(sys.argv[1]))")
    assert own_share.own_share("torch") == 5
    own_share.own_share.cache_clear()
