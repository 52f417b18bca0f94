"""What the tests of a plan share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_tiny_model


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 64 and 172: no usual group size divides 172."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "ragged", intermediate_size=172)
