"""Files beside the tensors: which go along with a model, and that one is written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmq.checkpoint import files
from llmq.checkpoint.files import (
    MODULES,
    TEMPLATES,
    goes_along,
    modules_beside,
    named_templates,
    put,
    sync_folder,
    write,
    write_all,
)
from tests.llmq.refusal import refused


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model", "TOKENIZER.MODEL",
        "qwen.tiktoken", "sentencepiece.bpe", "spiece.spm", "LICENSE", "license.md", "LICENCE", "Notice.txt", "COPYING",
        "USE_POLICY.md",
    ],
)  # fmt: skip
def test_configuration_tokenizer_and_licence_go_along(name: str) -> None:
    assert goes_along(name, code=False)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "optimizer.pt", "a.onnx", "README.md", ".gitattributes", "json",
    ],
)  # fmt: skip
def test_weights_and_the_rest_do_not(name: str) -> None:
    assert not goes_along(name, code=False) and not goes_along(name, code=True)


def test_code_goes_along_where_it_is_trusted() -> None:
    assert goes_along("modeling_mine.py", code=True) and not goes_along("modeling_mine.py", code=False)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data, stored in (("é", "é".encode()), (b"\0\1", b"\0\1"), ("", b"")):
        write(path, data)
        assert path.read_bytes() == stored
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_put_tells_the_digest_of_what_it_wrote(tmp_path: Path) -> None:
    pieces = [memoryview(b"ab"), memoryview(b""), memoryview(b"cde")]
    digest = put(tmp_path / "a", pieces, tmp_path / "b")
    assert digest == hashlib.sha256(b"abcde").hexdigest()
    assert (tmp_path / "a").read_bytes() == b"abcde" and not (tmp_path / "b").exists()


def test_what_was_there_stays_when_the_pieces_fail(tmp_path: Path) -> None:
    def broken() -> Iterator[memoryview]:
        yield memoryview(b"new")
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "a", broken(), tmp_path / "a.partial")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_nobody_sees_half_a_file(tmp_path: Path) -> None:
    """While it is written, the name has what it had, and the bytes stand under the other one."""

    def watched() -> Iterator[memoryview]:
        yield memoryview(b"n" * 10)
        assert (tmp_path / "a").read_bytes() == b"old" and (tmp_path / "p").read_bytes() == b"n" * 10
        yield memoryview(b"w")

    (tmp_path / "a").write_bytes(b"old")
    put(tmp_path / "a", watched(), tmp_path / "p")
    assert (tmp_path / "a").read_bytes() == b"n" * 10 + b"w"


def test_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), sync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("rename"), rename(self, to))[1])
    write(tmp_path / "a", "x")
    assert done == ["sync", "rename", "sync"]


def test_a_full_disk_is_told_with_the_file_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(files, "write_all", full)
    refused(lambda: write(tmp_path / "a", "new"), f"cannot write {tmp_path / 'a'}", "No space left", "run the same")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    refused(lambda: write(tmp_path / "none" / "a", "new"), str(tmp_path / "none" / "a"), "No such file")


def test_a_write_that_takes_a_part_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes] = []

    def three(_: int, data: memoryview) -> int:
        taken.append(bytes(data[:3]))
        return len(taken[-1])

    monkeypatch.setattr(os, "write", three)
    write_all(0, memoryview(b"abcdefgh"))
    assert taken == [b"abc", b"def", b"gh"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    """Some file systems do not do that; a disk that fails is another matter."""

    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    if passes:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output"):
            sync_folder(tmp_path)


def test_named_templates_are_those_that_transformers_reads(tmp_path: Path) -> None:
    from transformers.utils.hub import CHAT_TEMPLATE_DIR

    assert TEMPLATES == CHAT_TEMPLATE_DIR and named_templates(tmp_path) == {}
    (tmp_path / TEMPLATES / "more").mkdir(parents=True)
    for name in ("tool_use.jinja", "rag.jinja", "rag.txt", "more/deep.jinja"):
        (tmp_path / TEMPLATES / name).write_text("x")
    found = named_templates(tmp_path)
    assert list(found) == [f"{TEMPLATES}/rag.jinja", f"{TEMPLATES}/tool_use.jinja"]
    assert all(path == tmp_path / name for name, path in found.items())


def test_parts_that_a_modules_file_names_go_along_but_for_pickles(tmp_path: Path) -> None:
    assert modules_beside(tmp_path) == {}
    listed = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../other"}, {"path": "a/b"}, {}]
    (tmp_path / MODULES).write_text(json.dumps(listed))
    dense = "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"
    for name in ("1_Pooling/config.json", *dense, "3_Not/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = modules_beside(tmp_path)
    assert list(found) == ["1_Pooling/config.json", "2_Dense/model.safetensors"]
    assert all(path == tmp_path / name for name, path in found.items())
    for broken in ("{", "[1]", '{"path": 1}'):
        (tmp_path / MODULES).write_text(broken)
        assert modules_beside(tmp_path) == {}
