"""Ranks that do not write know what rank 0 has written."""

from __future__ import annotations

from pathlib import Path

import torch

from llmq import ranks
from llmq.checkpoint.follower import open_sink
from tests.together import together


def test_all_ranks_know_what_one_commits(tmp_path: Path) -> None:
    def work() -> tuple[list[str], list[float], bool]:
        tensors = {"a": torch.arange(3.0)} if ranks.first() else {}
        with open_sink(tmp_path / "out", {"run": 1}, 1) as sink:
            if "one" not in sink.done:
                sink.commit("one", tensors, {"error": 0.5})
            if not sink.finished:
                sink.finish({}, {}, {})
            return list(sink.done), sink.read("a").tolist(), sink.finished

    for _ in ("new", "finished already"):
        assert together(2, work) == [(["one"], [0.0, 1.0, 2.0], True)] * 2


def test_all_ranks_are_refused_if_the_folder_is_another_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    found = together(2, lambda: open_sink(tmp_path / "out", {"run": 1}, 1))
    assert all(isinstance(one, ranks.Common) and "holds other files" in str(one) for one in found)
