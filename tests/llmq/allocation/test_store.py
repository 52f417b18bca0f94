"""Results of earlier runs: found again, damaged, or not to be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq.allocation.store import Store
from llmq.watch import Silent


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_the_same_is_found_and_other_things_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other, watch = Store.of({"a": [1, 2]}), Store.of({"a": [2, 1]}), Notes()
    assert one.read("score") is None
    one.write("score", [[1.5, 0.0]], watch)
    assert Store.of({"a": [1, 2]}).read("score") == [[1.5, 0.0]] and other.read("score") is None
    assert one.folder.is_relative_to(tmp_path) and one.scratch("x").parent == one.folder
    (one.folder / "score.json").write_text("[[1.5,")
    assert one.read("score") is None and not watch.said


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    watch = Notes()
    Store(tmp_path / "file" / "x").write("score", [1], watch)
    assert "cannot be kept" in watch.said[0] and str(tmp_path / "file") in watch.said[0]
