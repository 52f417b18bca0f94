"""Snapshots: when they are kept, what of them is read back, and a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.allocation import snapshot
from llmq.allocation.snapshot import Snapshot
from llmq.discovery.calls import States
from llmq.discovery.handed import Store
from tests.llmq.refusal import refused

STATES = [[States(torch.randn(2, 3, 4)), States(torch.randn(1, 3, 4))], [], [States(torch.randn(1, 3, 4))]]
MORE = {"squares": torch.ones(2, 2, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "EVERY", 0.0)


def test_what_was_kept_is_read_back_and_cleared(tmp_path: Path) -> None:
    made = Snapshot(tmp_path / "s", 9)
    assert made.load() is None
    made.offer(3, STATES, MORE)
    kept = Snapshot(tmp_path / "s", 9).load()
    assert kept is not None and kept.block == 3 and torch.equal(kept.tensors["squares"], MORE["squares"])
    assert [[s.hidden.shape for s in chain] for chain in kept.states] == [[s.hidden.shape for s in c] for c in STATES]
    assert torch.equal(kept.states[2][0].hidden, STATES[2][0].hidden)
    made.clear()
    assert not (tmp_path / "s").exists()


def test_none_is_kept_after_the_last_block_too_soon_or_of_values_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Snapshot(tmp_path, 3).offer(3, STATES, MORE)
    Snapshot(None, 9).offer(1, STATES, MORE)
    Snapshot(tmp_path, 9).offer(1, [[States(torch.ones(1), {Store(0): {}})]], MORE)
    monkeypatch.setattr(snapshot, "EVERY", 1e9)
    Snapshot(tmp_path, 9).offer(1, STATES, MORE)
    assert not [*tmp_path.iterdir()]


def test_a_damaged_one_is_as_none(tmp_path: Path) -> None:
    Snapshot(tmp_path, 9).offer(1, STATES, MORE)
    file = tmp_path / "snapshot.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert Snapshot(tmp_path, 9).load() is None


def test_a_full_disk_is_told_and_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Snapshot(tmp_path, 9)
    made.offer(1, STATES, MORE)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    monkeypatch.setattr(snapshot, "SHARE", 0.0)
    made._next = 0.0
    refused(lambda: made.offer(2, STATES, MORE), "snapshot.safetensors", "No space left", "XDG_CACHE_HOME")
    kept = made.load()
    assert kept is not None and kept.block == 1
