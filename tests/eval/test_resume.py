"""An evaluation that is killed goes on from what it finished, and comes to the same numbers, digit for digit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from llmq.errors import LlmqError
from llmq_eval.journal import Journal
from llmq_eval.results import write
from llmq_eval.subject import Subject
from tests.conftest import Done, Run
from tests.forked import Command, Server


def kill_after(lines: int, process: Command, out: Path, kind: str) -> int:
    """Kill the process once a task's journal has so many lines; how many it had in the end."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        for file in out.glob(f"cache/{kind}*.journal"):
            if file.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return file.read_bytes().count(b"\n")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    raise AssertionError("the evaluation was over, or never began")


def numbers(out: Path) -> dict[str, object]:
    """Everything measured under `out`, by model."""
    return {file.name.rpartition("-")[0]: json.loads(file.read_text())["measures"] for file in out.glob("results/*")}


def resumed(done: Done) -> bool:
    return done.returncode == 0 and "resuming after" in done.stderr


@pytest.mark.slow
def test_killed_between_windows(tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run, forked: Server) -> None:
    options = ("--text", text_file, "--window", 32, "--max-windows", 150, "--batch", 3)
    command = (tiny_model, "--base", tiny_model, "--tasks", "perplexity,divergence", *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert llmq("eval", *command, "--out", whole).returncode == 0
    for kind in ("perplexity", "divergence"):
        kept = kill_after(3, forked.start("eval", *command, "--out", broken), broken, kind)
        assert kept < 50
    done = llmq("eval", *command, "--out", broken)
    assert resumed(done), done.stderr
    assert numbers(broken) == numbers(whole)
    assert not list(broken.glob("cache/*.journal"))
    again = llmq("eval", *command, "--out", broken)
    assert again.stderr.count("measured before") == 2
    assert numbers(broken) == numbers(whole)


@pytest.mark.slow
def test_killed_between_requests(tmp_path: Path, llmq: Run, forked: Server) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [
        {"goal": f"count to {i}", "sol1": "one two " * (1 + i % 7), "sol2": "three", "label": i % 2} for i in range(60)
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("demo", "--tasks", "piqa", "--data-dir", data, "--batch-size", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert llmq("eval", *command, "--out", whole).returncode == 0
    assert kill_after(2, forked.start("eval", *command, "--out", broken), broken, "piqa") < 29
    done = llmq("eval", *command, "--out", broken)
    assert resumed(done), done.stderr
    assert numbers(broken) == numbers(whole)


@pytest.mark.slow
def test_a_changed_model_is_measured_again(tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    command = ("eval", folder, "--text", text_file, "--window", 32, "--max-windows", 2, "--out", tmp_path / "out")
    assert "measured before" not in llmq(*command).stderr
    assert "measured before" in llmq(*command).stderr
    assert "measured before" not in llmq(*command, "--batch", 2).stderr
    assert "measured before" in llmq(*command, "--tasks", f"perplexity,perplexity:{text_file}").stderr
    # Another protocol's number stands beside the first; the same text by another name is the same number.
    assert llmq(*command[:-3], 1, *command[-2:]).returncode == 0
    (of,) = numbers(tmp_path / "out").values()
    assert [f"{count} × 32 tokens" in one["protocol"] for count, one in zip((2, 1), of, strict=True)] == [True, True]  # type: ignore[arg-type, call-overload, index]
    assert "measured before" not in llmq(*command, "--fresh").stderr
    # Neither size nor time tell the weights of one file from another's.
    weights = folder / "model.safetensors"
    state, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "measured before" not in llmq(*command).stderr


def test_journal_leaves_out_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "a" / "journal"
    with Journal(file) as journal:
        journal.add({"0": 0.1 + 0.2, "1": [1e-300, True]})
        journal.add({"2": 3})
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with Journal(file) as journal:
        assert journal.done == {"0": 0.1 + 0.2, "1": [1e-300, True]}
        journal.add({"2": 4})
    assert Journal(file).done == {"0": 0.1 + 0.2, "1": [1e-300, True], "2": 4}


@pytest.mark.slow
def test_damage_is_measured_again(tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run) -> None:
    out = tmp_path / "out"
    command = ("eval", tiny_model, "--text", text_file, "--window", 32, "--max-windows", 2, "--out", out)
    assert llmq(*command).returncode == 0
    (file,) = (out / "cache").iterdir()
    whole = file.read_text()
    for damaged in ("[1]", '{"a": 1}', '"abc"', "[]", "[" * 100_000, whole.replace('"value": ', '"value": "x')):
        file.write_text(damaged)
        done = llmq(*command)
        assert done.returncode == 0 and "measured before" not in done.stderr, done.stderr
        assert file.read_text() == whole
    # A journal's pieces have a checksum each: a damaged one is not taken for a number.
    file.unlink()
    journal = file.with_suffix(".journal")
    with Journal(journal) as pieces:
        pieces.add({"0": 5.0})
        pieces.add({"1": 6.0})
    journal.write_text(journal.read_text().replace("5.0", "9.0"))
    assert Journal(journal).done == {"1": 6.0}


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    class Full:
        def write(self, text: str) -> None:
            return

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        close = flush

    journal = Journal(tmp_path / "a.journal")
    journal._out = Full()  # type: ignore[assignment]
    with pytest.raises(LlmqError, match=r"a\.journal cannot be written: No space left.*--out"), journal:
        journal.add({"0": 1.0})
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").mkdir()
    with pytest.raises(LlmqError, match=r"a\.json cannot be written"):
        write(tmp_path / "results" / "a.json", "text")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["a.json"]


@pytest.mark.slow
def test_where_nothing_can_be_written(tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run) -> None:
    (tmp_path / "file").write_text("")
    short = ("--text", text_file, "--window", 32, "--max-windows", 2, "--out", tmp_path / "file")
    for more in ((), ("--fresh",)):
        done = llmq("eval", tiny_model, *short, *more)
        assert done.returncode == 2 and "--out" in done.stderr and "Traceback" not in done.stderr


def test_large_files_go_by_samples_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file too large to hash: its beginning, its end and pieces between, besides its time."""
    monkeypatch.setattr("llmq_eval.subject._SMALL", 1 << 10)
    weights = tmp_path / "model.safetensors"
    content = bytearray(3 << 20)
    found = set()
    for place in (None, 0, (1 << 20) - 1, (3 << 20) - 1, (3 << 20) // 2):
        changed = bytearray(content)
        if place is not None:
            changed[place : place + (16 << 10)] = b"x" * len(changed[place : place + (16 << 10)])
        weights.write_bytes(changed)
        os.utime(weights, ns=(0, 0))
        found.add(Subject("m", "m", tmp_path).fingerprint)
    os.utime(weights, ns=(0, 1))
    found.add(Subject("m", "m", tmp_path).fingerprint)
    assert len(found) == 6
