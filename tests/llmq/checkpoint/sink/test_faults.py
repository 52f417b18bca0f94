"""Sink, faults: whatever fails or kills it at whatever moment, the same calls end in the same bytes."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.checkpoint.files import INDEX
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import FolderSource
from tests.llmq.checkpoint.sink.job import CONFIG, PRINT, content, in_child, opened, work
from tests.llmq.refusal import refused


class Failing:
    """Makes the n-th of the calls that change the disk fail, or kill the process, before or half-way through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, code: int | None) -> None:
        self.count, self.at, self.code, self.half = 0, at, code, False
        for module, name in ((os, "write"), (os, "fsync"), (os, "open"), (os, "ftruncate"), (Path, "rename")):
            monkeypatch.setattr(module, name, self.wrap(name, getattr(module, name)))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                if name == "write" and len(args[1]) > 1:
                    real(args[0], args[1][: len(args[1]) // 2])
                if self.code is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        return call


def calls_of_a_run(tmp_path: Path, carried: dict[str, Path]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch, -1, None)
        work(tmp_path / "counted", carried)
        return failing.count


@pytest.mark.slow
def test_killed_at_every_call(tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes]) -> None:
    for at in range(1, calls_of_a_run(tmp_path, carried) + 1):
        out = tmp_path / f"killed{at}"

        def job(out: Path = out, at: int = at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Failing(patch, at, None)
                work(out, carried)

        assert in_child(job) == -signal.SIGKILL
        loadable = (out / INDEX).exists()
        assert not loadable or FolderSource(out, quantized_ok=True).names()
        assert work(out, carried) == []
        assert content(out) == unbroken, at


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(
    tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes]
) -> None:
    rng = random.Random(0)
    began = time.perf_counter()
    work(tmp_path / "timed", carried)
    took = time.perf_counter() - began
    kills = 0
    for number in range(15):
        out = tmp_path / f"random{number}"
        for _ in range(4):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(out, carried)
                    code = 0
                finally:
                    os._exit(code)
            time.sleep(rng.uniform(0, took * 0.6))
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert work(out, carried) == []
        assert content(out) == unbroken
    assert kills > 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_call_fails_once(tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes], code: int) -> None:
    for at in range(1, calls_of_a_run(tmp_path, carried) + 1):
        out = tmp_path / f"failed{at}"
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, at, code)
            message = refused(partial(work, out, carried), str(out))
        if "cannot write to" not in message:
            assert ("disk full" in message) == (code != errno.EIO)
            assert "run the same command again" in message and "of 5 blocks are kept" in message
            assert not out.exists() or not list((out / ".llmq").glob("*.partial"))
        assert work(out, carried) == []
        assert content(out) == unbroken, at


def test_a_failure_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, 3, errno.ENOSPC)
        refused(lambda: opened(tmp_path / "o"), "disk full", "fingerprint.json")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory at the folder; yields a function that remounts it with other options."""

    def mount(extra: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", extra, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode

    folder.mkdir()
    try:
        if mount(options):
            pytest.skip("mounting a tmpfs is not permitted here")
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    try:
        yield lambda extra: None if mount(f"remount,{extra}") == 0 else pytest.fail("remount")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_then_room(tmp_path: Path, carried: dict[str, Path]) -> None:
    def run(out: Path) -> None:
        with Sink.open(out, PRINT, 4) as sink:
            for unit in ["a", "b", "c", "d"]:
                if unit not in sink.done:
                    sink.commit(unit, {f"{unit}.w": torch.full((100_000,), ord(unit))}, {})
            sink.finish(CONFIG, carried, {})

    run(tmp_path / "roomy")
    with tmpfs(tmp_path / "disk", "size=2m") as remount:
        out = tmp_path / "disk" / "out"
        message = refused(lambda: run(out), "disk full while writing model-00003-of-00004.safetensors", "2 of 4 blocks")
        assert "800,1" in message and "same command" in message
        assert sorted(content(out)) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2)]
        assert not list((out / ".llmq").glob("*.partial"))
        refused(lambda: run(out), "disk full", "2 of 4 blocks")
        remount("size=8m")
        run(out)
        assert content(out) == content(tmp_path / "roomy")


def test_read_only_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=2m") as remount:
        opened(tmp_path / "disk" / "begun")
        remount("ro")
        refused(lambda: opened(tmp_path / "disk" / "out"), "Read-only file system", "another folder")
        refused(lambda: opened(tmp_path / "disk" / "begun"), "Read-only file system")
