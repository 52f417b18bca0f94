"""Which grids the installed compressed-tensors knows."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

from llmq.grids.scheme import Scheme


def known_to_compressed_tensors(scheme: Scheme) -> None:
    """Skip the test where the installed version has no layout for a scheme: 6-bit floats came with 0.20."""
    if scheme.rules.layout and scheme.bits == 6 and Version(version("compressed-tensors")) < Version("0.20"):
        pytest.skip("compressed-tensors before 0.20 has no 6-bit floats")
