"""Names of rounded caches."""

from __future__ import annotations

import pytest

from llmq.grids.cache import CACHES, Cache
from tests.llmq.refusal import refused


@pytest.mark.parametrize("name", CACHES)
def test_a_name_is_read_back(name: str) -> None:
    cache = Cache.named(name)
    assert str(cache) == name
    assert cache.heads == name.endswith("-head") and (cache.grid == "int") == name.startswith("int8")


def test_another_name_is_refused_with_those_that_there_are() -> None:
    refused(lambda: Cache.named("fp4"), "fp8", "int8-head", "'fp4'")
