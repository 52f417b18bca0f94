"""The oldest versions that pyproject.toml promises are those that `make oldest` runs the tests with."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PROMISED = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["eval"], *EXTRAS["gpu"])]
# Other builds of torch than the newest CPU one bring gigabytes of CUDA; its oldest version is that of the GPU machine.
ELSEWHERE = {"torch"}


def pinned(file: str) -> dict[str, Version]:
    """name == version, a line each."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


@pytest.mark.parametrize("promise", PROMISED, ids=lambda promise: promise.name)
def test_the_oldest_promised_version_is_tested(promise: Requirement) -> None:
    bounds = [Version(part.version) for part in promise.specifier if part.operator == ">="]
    assert len(bounds) == 1, f"{promise} promises no oldest version"
    name = canonicalize_name(promise.name)
    if name not in ELSEWHERE:
        assert pinned("constraints-oldest.txt").get(name) == bounds[0]


@pytest.mark.parametrize("promise", PROMISED, ids=lambda promise: promise.name)
def test_the_pinned_version_is_promised(promise: Requirement) -> None:
    assert pinned("constraints.txt")[canonicalize_name(promise.name)] in promise.specifier
