"""Whose folder it is: a foreign one is left alone, a locked one waited for, another run's told apart in words."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmq.checkpoint.claim import FINGERPRINT, STATE, compare, refuse_foreign, take_lock
from tests.llmq.refusal import refused


def test_folders_that_are_ours_or_nobody_s(tmp_path: Path) -> None:
    refuse_foreign(tmp_path / "not there")
    refuse_foreign(tmp_path)
    (tmp_path / STATE).mkdir()
    refuse_foreign(tmp_path)
    (tmp_path / STATE / FINGERPRINT).write_text("{}")
    (tmp_path / "model.safetensors").touch()
    refuse_foreign(tmp_path)


def test_folders_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    message = refused(lambda: refuse_foreign(tmp_path), str(tmp_path), "(thesis.txt)", "choose a new or an empty")
    assert "more" not in message
    (tmp_path / "a").touch()
    (tmp_path / "z").mkdir()
    (tmp_path / STATE).mkdir()  # a lock alone does not make it ours
    refused(lambda: refuse_foreign(tmp_path), "(a and 2 more)")
    refused(lambda: refuse_foreign(tmp_path / "thesis.txt"), "thesis.txt is a file, not a folder")


def test_one_run_has_the_folder_until_it_lets_go(tmp_path: Path) -> None:
    (tmp_path / STATE).mkdir()
    held = take_lock(tmp_path)
    refused(lambda: take_lock(tmp_path), f"another llmq is writing to {tmp_path}", "wait for it")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    refused(lambda: take_lock(tmp_path), "another llmq")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before  # a refusal keeps no file open
    os.close(held)
    os.close(take_lock(tmp_path))


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / STATE).mkdir()
    monkeypatch.setattr(fcntl, "flock", without)
    os.close(take_lock(tmp_path))


def stored(out: Path, fingerprint: Any) -> Path:
    """A folder that holds a run."""
    (out / STATE).mkdir(exist_ok=True)
    (out / STATE / FINGERPRINT).write_text(json.dumps(fingerprint))
    return out


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    wanted = {"recipe": {"scheme": {"bits": 4}, "keep": ["a", "b"], "none": None, "empty": {}}, "seed": 0}
    compare(stored(tmp_path, dict(reversed(wanted.items()))), wanted)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"recipe": {"scheme": {"bits": 4}}}, {"recipe": {"scheme": {"bits": 3}}}, "(recipe: scheme.bits 4 → 3)"),
        ({"seed": 1}, {"seed": 1, "tp": 2}, "(tp nothing → 2)"),
        ({"seed": 1, "tp": 2}, {"seed": 1}, "(tp 2 → nothing)"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "(a [1, 2] → [2, 1])"),
        ({"a": True}, {"a": False}, "(a true → false)"),
        ({"a": "x"}, {"a": {"b": 1}}, "(a x → nothing, a: b nothing → 1)"),
        ({"a": "f" * 64}, {"a": "0" * 41}, f"(a {'f' * 12}… → {'0' * 12}…)"),
        ({"a": "f" * 40}, {"a": ""}, f"(a {'f' * 40} → )"),
        ({}, {"a": 1}, "a nothing → 1"),
        ({"a": {}, "b": 1}, {"b": 1}, "(a {} → nothing)"),
    ],
)
def test_another_run_is_told_by_what_differs(tmp_path: Path, before: Any, after: Any, words: str) -> None:
    message = refused(lambda: compare(stored(tmp_path, before), after), str(tmp_path), "holds another run", words)
    assert message.endswith("choose another folder, or delete this one to start again")


def test_a_key_that_is_there_with_nothing_is_not_one_that_is_not_there(tmp_path: Path) -> None:
    refused(lambda: compare(stored(tmp_path, {"a": None, "b": 1}), {"b": 1}), "(a nothing → nothing)")


def test_eight_differences_are_shown(tmp_path: Path) -> None:
    many = {f"k{i}": i for i in range(10)}
    message = refused(lambda: compare(stored(tmp_path, many), dict.fromkeys(many, -1)), "and 2 more")
    assert message.count("→") == 8


def test_a_damaged_fingerprint_says_so(tmp_path: Path) -> None:
    file = stored(tmp_path, {}) / STATE / FINGERPRINT
    for damaged in (b"{", b"", b"\xff\xfe"):
        file.write_bytes(damaged)
        refused(lambda: compare(tmp_path, {}), str(file), "damaged", "delete this one to start again")
