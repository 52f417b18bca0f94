"""Which class of a file is the method, read from its source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmq.recipe import catalog
from tests.llmq.refusal import refused

CACHES = (catalog._own, catalog.describe)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In place of llmq/methods."""
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    for cache in CACHES:
        cache.cache_clear()
    yield tmp_path
    for cache in CACHES:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("from llmq.methods.base import Method\nclass A: ...\nclass B(Method): ...\n", "B"),
        ("from llmq.methods import Method as M\nclass A(Exception): ...\nclass B(M): ...\n", "B"),
        ("from llmq import methods\nclass A: ...\nclass B(methods.Method): ...\n", "B"),
        ("from llmq.methods.base import Method\nclass _A(Method): ...\nclass B(_A): ...\n", "B"),
        ("from llmq.methods.base import Method\nclass _A(Method): ...\nclass C: ...\nclass B(C, _A): ...\n", "B"),
        # A name that is given twice, so that the classes seem to go in a circle.
        ("from llmq.methods.base import Method\nclass A: ...\nclass B(A): ...\nclass A(B, Method): ...\n", "A"),
    ],
)
def test_the_class_derived_from_method(text: str, kind: str, folder: Path) -> None:
    (folder / "mine.py").write_text(text)
    assert catalog.describe("mine").kind == kind


def test_what_a_base_in_the_file_says_is_the_methods_too(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from llmq.methods.base import Method\n"
        "class _Shared(Method):\n"
        "    scheme = {'bits': 3}\n"
        "    def __init__(self, *, sweeps: int = 2, tries: int = 1): ...\n"
        "    def transform(self, block): ...\n"
        "class Mine(_Shared):\n"
        "    '''Does it. sweeps: how often; tries: how long.'''\n"
        "    def __init__(self, *, sweeps: int = 5): ...\n"
        "    def quantize(self, weight, scheme, stats, scale_dtype): ...\n"
    )
    found = catalog.describe("mine")
    assert [(o.name, o.default, o.help) for o in found.options] == [("sweeps", 5, "how often")]
    assert (found.roles, found.scheme, found.summary) == (("transform", "quantize"), {"bits": 3}, "Does it")


def test_a_file_without_a_method_is_named(folder: Path) -> None:
    (folder / "mine.py").write_text("class Method: ...\nclass Mine: ...\n")
    refused(lambda: catalog.describe("mine"), "method 'mine'", "mine.py has no class derived from Method")
