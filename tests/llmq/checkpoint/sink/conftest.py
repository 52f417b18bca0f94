"""A folder in memory, what a job carries along, and what it comes to unbroken."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llmq.checkpoint.sink.job import aux, content, work


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: these tests sync thousands of times."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield tmp_path


@pytest.fixture
def carried(tmp_path: Path) -> dict[str, Path]:
    return aux(tmp_path / "source")


@pytest.fixture
def unbroken(tmp_path: Path, carried: dict[str, Path]) -> dict[str, bytes]:
    work(tmp_path / "unbroken", carried)
    return content(tmp_path / "unbroken")
