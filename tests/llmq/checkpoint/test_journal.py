"""The journal: units that are replaced after all are written, whatever kills the run, and a journal that is torn."""

from __future__ import annotations

import errno
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmq.checkpoint.journal import JOURNAL, check_finished
from llmq.checkpoint.sink import Sink
from tests.llmq.checkpoint.sink import conftest
from tests.llmq.checkpoint.sink.job import CONFIG, PRINT, UNITS, content, in_child, tensors_of
from tests.llmq.checkpoint.sink.test_faults import Failing
from tests.llmq.refusal import refused

tmp_path, carried = conftest.tmp_path, conftest.carried
REPLACED = ("embeddings", "block 1", "nothing", "block 2")


def work(out: Path, carried: dict[str, Path]) -> list[str]:
    """A job that adds 1 to what it has written, once all is written: done twice, it would add 2."""
    with Sink.open(out, PRINT, len(UNITS)) as sink:
        for unit in UNITS:
            if unit not in sink.done:
                sink.commit(unit, tensors_of(unit), {"times": 0})
        if "decided" not in sink.done:
            sink.record("decided", {"add": 1})
        add = sink.done["decided"]["add"]
        for unit in REPLACED:
            if not sink.done[unit]["times"]:
                found = {n: t if t.dtype is torch.bool else t + add for n, t in sink.read_unit(unit).items()}
                sink.replace(unit, found, {"times": 1})
                assert {n: t.tolist() for n, t in sink.read_unit(unit).items()} == {
                    n: t.tolist() for n, t in found.items()
                }
        sink.finish(CONFIG, carried, {"report.json": json.dumps(sink.done)})
        return sink.notes


@pytest.fixture
def whole(tmp_path: Path, carried: dict[str, Path]) -> dict[str, bytes]:
    work(tmp_path / "whole", carried)
    return content(tmp_path / "whole")


def calls(tmp_path: Path, carried: dict[str, Path]) -> range:
    """The calls from the last unit's first writing on: `test_faults.py` has those before."""
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch, -1, None)
        counts = [0]

        def commit(sink: Sink, unit: str, *args: Any) -> None:
            counts.append(failing.count)
            real(sink, unit, *args)

        real = Sink.commit
        patch.setattr(Sink, "commit", commit)
        work(tmp_path / "counted", carried)
        return range(counts[-1] + 1, failing.count + 1)


def test_what_is_replaced_is_read_back(tmp_path: Path, carried: dict[str, Path], whole: dict[str, bytes]) -> None:
    out = tmp_path / "whole"
    assert check_finished(out)
    with Sink.open(out, PRINT, len(UNITS)) as sink:
        assert sink.finished and list(sink.done) == [*UNITS, "decided"]
        for unit in UNITS:
            for name, tensor in tensors_of(unit).items():
                added = int(unit in REPLACED and tensor.dtype is not torch.bool)
                assert torch.equal(sink.read(name), tensor + added if added else tensor)
        with pytest.raises(ValueError, match="other tensors"):
            sink.replace("block 1", {}, {})
        with pytest.raises(ValueError, match="not committed"):
            sink.replace("block 7", {}, {})


@pytest.mark.slow
def test_killed_at_every_call(tmp_path: Path, carried: dict[str, Path], whole: dict[str, bytes]) -> None:
    for at in calls(tmp_path, carried):
        out = tmp_path / f"killed{at}"

        def job(out: Path = out, at: int = at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Failing(patch, at, None)
                work(out, carried)

        assert in_child(job) == -signal.SIGKILL
        assert work(out, carried) == []
        assert content(out) == whole, at


@pytest.mark.slow
def test_every_call_fails_once(tmp_path: Path, carried: dict[str, Path], whole: dict[str, bytes]) -> None:
    for at in calls(tmp_path, carried):
        out = tmp_path / f"failed{at}"
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, at, errno.ENOSPC)
            refused(partial(work, out, carried), str(out))
        assert work(out, carried) == []
        assert content(out) == whole, at


@pytest.mark.parametrize("unit", [0, 1, 2, 4])
def test_a_damaged_shard_is_done_again(
    tmp_path: Path, carried: dict[str, Path], whole: dict[str, bytes], unit: int
) -> None:
    """What was replaced before it is done again as well, from its first writing."""
    out = tmp_path / "whole"
    (out / f"model-{unit + 1:05d}-of-00005.safetensors").write_bytes(b"x")
    refused(lambda: check_finished(out), f"model-{unit + 1:05d}", "run the command")
    notes = work(out, carried)
    assert len(notes) == 1 and UNITS[unit] in notes[0]
    assert content(out) == whole


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), flip=st.booleans())
def test_torn_anywhere(tmp_path: Path, carried: dict[str, Path], whole: dict[str, bytes], cut: int, flip: bool) -> None:
    out = tmp_path / "whole"
    journal = out / ".llmq" / JOURNAL
    raw = bytearray(journal.read_bytes())
    cut %= len(raw) - 1
    if flip:
        raw[cut] = 0
    else:
        del raw[cut:]
    journal.write_bytes(raw)
    work(out, carried)
    assert content(out) == whole
