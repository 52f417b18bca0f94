"""Sink: whatever fails or kills it at whatever moment, the same calls end in the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmq.checkpoint.files import INDEX
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import FolderSource
from tests.llmq.checkpoint.sink.job import CONFIG, PRINT, UNITS, content, in_child, opened, tensors_of, work
from tests.llmq.refusal import refused


def test_what_is_written(tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "unbroken"
    shards = [f"model-{number:05d}-of-00005.safetensors" for number in (1, 2, 3, 5)]
    others = ["README.md", "config.json", "report.json", "tokenizer.json", "additional_chat_templates/rag.jinja", INDEX]
    assert sorted(unbroken) == sorted([*shards, *others])
    assert unbroken["README.md"] == b"card" and json.loads(unbroken["config.json"]) == CONFIG
    index = json.loads(unbroken[INDEX])
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"]["total_size"] == 4 * (16 * 8 * 4 + 16 * 2 + 3)
    source = FolderSource(out, quantized_ok=True)
    for unit, shard in zip([unit for unit in UNITS if unit != "nothing"], shards, strict=True):
        loaded = load_file(out / shard)
        for name, tensor in tensors_of(unit).items():
            assert index["weight_map"][name] == shard
            assert torch.equal(loaded[name], tensor) and torch.equal(source.read(name), tensor)


def test_read_back(tmp_path: Path) -> None:
    with Sink.open(tmp_path / "o", PRINT, 5) as sink:
        for unit in UNITS[:4]:
            sink.commit(unit, tensors_of(unit), {})
        assert sink.total_bytes == 3 * (16 * 8 * 4 + 16 * 2 + 3)
        for unit in UNITS[:4]:
            read = sink.read_unit(unit)
            assert read.keys() == tensors_of(unit).keys() == sink.infos(unit).keys()
            assert all(torch.equal(read[name], tensor) for name, tensor in tensors_of(unit).items())
        assert torch.equal(sink.read("block 1.codes"), tensors_of("block 1")["block 1.codes"])


def test_finished_is_seen(tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "unbroken"
    with Sink.open(out, PRINT, 5) as sink:
        assert sink.finished and list(sink.done) == UNITS and sink.done["block 1"]["rows"] == [2, None]
    (out / "README.md").write_text("my own words")
    assert work(out, carried) == [] and (out / "README.md").read_text() == "my own words"
    (out / "config.json").unlink()
    with Sink.open(out, PRINT, 5) as sink:
        assert not sink.finished and not (out / INDEX).exists()
    work(out, carried)
    assert content(out) == unbroken


def test_misuse(tmp_path: Path, carried: dict[str, Path]) -> None:
    with Sink.open(tmp_path / "o", PRINT, 2) as sink:
        sink.commit("a", {"w": torch.ones(1)}, {})
        with pytest.raises(ValueError, match="committed already"):
            sink.commit("a", {}, {})
        with pytest.raises(ValueError, match="earlier units"):
            sink.commit("b", {"w": torch.ones(1)}, {})
        with pytest.raises(ValueError, match="1 of 2"):
            sink.finish({}, {}, {})
        with pytest.raises(TypeError):
            sink.commit("b", {"v": torch.ones(1)}, {"x": object()})
        refused(lambda: sink.commit("b", {"v": torch.ones(1, dtype=torch.complex128)}, {}), "v", "complex128")
        sink.commit("b", {}, {})
        with pytest.raises(ValueError, match="one more"):
            sink.commit("c", {}, {})
        refused(lambda: sink.finish({}, {"gone.json": tmp_path / "gone.json"}, {}), "cannot read", "gone.json")
    assert sorted(content(tmp_path / "o")) == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("done", range(len(UNITS) + 1))
def test_resume(tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes], done: int) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with Sink.open(out, PRINT, 5) as sink:
        for number, unit in enumerate(UNITS[:done]):
            sink.commit(unit, tensors_of(unit), {"error": 0.1 * number, "rows": (number, None)})
        before = sink.done
    (out / ".llmq" / "model-00009-of-00005.safetensors.partial").write_bytes(b"torn")
    (out / f"model-{done + 1:05d}-of-00005.safetensors").write_bytes(b"renamed, but not in the journal")
    with Sink.open(out, PRINT, 5) as sink:
        assert sink.done == before and list(sink.done) == UNITS[:done] and not sink.finished and not sink.notes
    assert work(out, carried) == []
    assert content(out) == unbroken
    assert not list((out / ".llmq").glob("*.partial"))


def damaged(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[-5] ^= 1
    path.write_bytes(raw[:-3] if how == "cut" else raw)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_shard(
    tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes], how: str, finished: bool
) -> None:
    out = tmp_path / "unbroken"
    if not finished:
        (out / "config.json").unlink()
    damaged(out / "model-00003-of-00005.safetensors", how)
    with Sink.open(out, PRINT, 5) as sink:
        assert list(sink.done) == UNITS[:2] and not sink.finished
        (note,) = sink.notes
        assert "model-00003-of-00005.safetensors" in note and "block 1" in note
    assert not (out / "model-00005-of-00005.safetensors").exists() and not (out / INDEX).exists()
    work(out, carried)
    assert content(out) == unbroken


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), flip=st.booleans())
def test_journal_torn_anywhere(
    tmp_path: Path, carried: dict[str, Path], unbroken: dict[str, bytes], cut: int, flip: bool
) -> None:
    out = tmp_path / "unbroken"
    journal = out / ".llmq" / "journal.jsonl"
    raw = bytearray(journal.read_bytes())
    cut %= len(raw) - 1  # the last newline, flipped, is a line torn off
    if flip:
        raw[cut] = 0
    else:
        del raw[cut:]
    journal.write_bytes(raw)
    notes = work(out, carried)
    assert bool(notes) == flip, notes
    assert content(out) == unbroken


def test_another_run(tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "unbroken"
    before = content(out, state=True)
    other = {"methods": ["rtn"], "scheme": {"bits": 3, "group_size": 64}}
    refused(
        lambda: opened(out, recipe=other),
        "recipe: scheme.bits 4 → 3",
        "recipe: scheme.group_size nothing → 64",
        "another folder",
        "delete",
    )
    refused(lambda: opened(out, units=7), "blocks 5 → 7")
    refused(lambda: opened(out, source="cd" * 32), "source abababababab… → cdcdcdcdcdcd…")
    refused(lambda: opened(out, versions={"torch": "9"}), "versions: torch nothing → 9")
    refused(lambda: opened(out, **{f"k{i}": i for i in range(20)}), "and 12 more")
    assert content(out, state=True) == before
    opened(out)
    (out / ".llmq" / "fingerprint.json").write_text("{")
    refused(lambda: opened(out), "fingerprint.json is damaged", "delete")


def test_not_ours(tmp_path: Path) -> None:
    for names in (["notes.txt"], ["config.json", "model.safetensors"], [".git"], [".llmq", "x"]):
        out = tmp_path / names[0].replace(".", "")
        out.mkdir()
        for name in names:
            (out / name).mkdir() if name == ".llmq" else (out / name).write_text("mine")
        before = sorted(map(str, out.rglob("*")))
        refused(partial(opened, out), "holds other files", "choose")
        assert sorted(map(str, out.rglob("*"))) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    opened(empty)
    begun = tmp_path / "killed before its fingerprint"
    (begun / ".llmq").mkdir(parents=True)
    (begun / ".llmq" / "lock").touch()
    (begun / ".llmq" / "fingerprint.json.partial").touch()
    opened(begun)


def test_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(lambda: opened(file), "is a file", "another folder")
    refused(lambda: opened(file / "below"), "cannot write", "below", "another folder")
    refused(lambda: opened(Path("/proc/llmq/out")), "cannot write", "/proc/llmq/out")
    refused(lambda: opened(tmp_path / ("x" * 300)), "cannot write", "name too long")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(lambda: opened(tmp_path / "dangling"), "cannot write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"] and file.read_text() == "mine"


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of another user's, and that user's rights while the test runs; root's would pass everything."""
    if os.geteuid() != 0:
        yield Path(tempfile.mkdtemp())
        return
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_permission(as_nobody: Path) -> None:
    locked = as_nobody / "locked"
    locked.mkdir(mode=0o555)
    refused(lambda: opened(locked / "out"), "cannot write", "Permission denied", "another folder")
    refused(lambda: opened(locked), "cannot write", "Permission denied")
    assert list(locked.iterdir()) == []
    out = as_nobody / "out"
    with Sink.open(out, PRINT, 2) as sink:
        sink.commit("a", {"w": torch.ones(4)}, {})
        (out / ".llmq").chmod(0o555)
        refused(lambda: sink.commit("b", {"v": torch.ones(4)}, {}), "Permission denied", "1 of 2 blocks are kept")
        (out / ".llmq").chmod(0o755)
        sink.commit("b", {"v": torch.ones(4)}, {})
    source = out / "model-00001-of-00002.safetensors"
    source.chmod(0)
    refused(lambda: opened(out, units=2), "cannot read", source.name)


def test_two_at_once(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with Sink.open(out, PRINT, 5) as sink:
        sink.commit("embeddings", tensors_of("embeddings"), {})
        before = content(out, state=True)
        refused(lambda: opened(out), "another llmq", "another folder")
        assert content(out, state=True) == before
    opened(out)


def test_no_locks_on_this_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    opened(tmp_path / "o")


def test_writing_takes_no_memory(tmp_path: Path) -> None:
    mib = 1 << 20
    big = {f"w{i}": torch.ones(32 * mib, dtype=torch.uint8) for i in range(4)}

    def resident(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) // 1024

    def job() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        with Sink.open(tmp_path / "o", PRINT, 1) as sink:
            sink.commit("all", big, {})
        assert resident("VmHWM") - before < 24

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads /proc")
    assert in_child(job) == 0
