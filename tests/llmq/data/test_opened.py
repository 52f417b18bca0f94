"""Files as text: endings, byte order marks, lines, and where what is no text is."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llmq.data.opened import decode, is_compressed, lines_of, read_bytes, read_text, refuse_no_text, suffix
from tests.llmq.refusal import refused


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSONL", ".jsonl"),
        ("a.b.jsonl.gz", ".jsonl"),
        ("a.CSV.zst.GZ", ".csv"),
        ("a.gz", ".gz"),
        ("a", ""),
    ],
)
def test_the_ending_before_that_of_the_compression_counts(name: str, ending: str) -> None:
    assert suffix(Path(name)) == ending


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_chunks_may_end_anywhere(encoding: str) -> None:
    text = "d\u00e9j\u00e0 \U0001f41d\r\nvu"
    raw = text.encode(encoding)
    assert "".join(decode([raw[:4], *(raw[i : i + 1] for i in range(4, len(raw)))], "a")) == text


def test_a_mark_is_one_at_the_start_only() -> None:
    assert "".join(decode([b"a\xef\xbb\xbf"], "a")) == "a\ufeff"
    assert "".join(decode([b"\xef\xbb\xbfa"], "a", begin=8)) == "\ufeffa"


def test_the_text_before_a_fault_comes_first() -> None:
    chunks = decode([b"see\nno", b"on\nv\xff"], "a.txt", "save it anew")
    assert [next(chunks), next(chunks)] == ["see\nno", "on\nv"]
    refused(lambda: next(chunks), "a.txt:3 is not UTF-8 text: save it anew")


def test_lines_are_cut_at_line_feeds_only() -> None:
    assert [*lines_of(["a\u2028b", "\r\nc", "\n\nd"])] == ["a\u2028b\r\n", "c\n", "\n", "d"]
    assert [*lines_of(["a\n"])] == ["a\n"] and [*lines_of([])] == []


def test_lines_may_end_in_returns_as_old_macs_write_them() -> None:
    assert [*lines_of(["a\rb", "\rc\r"])] == ["a\r", "b\r", "c\r"]
    assert [*lines_of(["a\r", "\nb"])] == ["a\r\n", "b"]
    assert [*lines_of(["a\r", "b\r"])] == ["a\r", "b\r"]
    assert [*lines_of(["a\nb\rc\n"])] == ["a\n", "b\rc\n"]
    assert [*lines_of(['"a\nb"\r"c\rd"\r'])] == ['"a\nb"\r', '"c\r', 'd"\r']
    assert [*lines_of(['"a\rb"\nc'])] == ['"a\rb"\n', "c"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.html", "a web page"),
        ("A.XML", "XML"),
        ("a.yaml", "YAML"),
        ("a.yml.gz", "YAML"),
        ("a.ipynb", "a notebook"),
        ("a.docx", "a document"),
        ("a.tar.gz", "an archive"),
        ("a.xlsx", "a spreadsheet"),
    ],
)
def test_an_ending_that_is_neither_prose_nor_rows(name: str, kind: str) -> None:
    refused(lambda: refuse_no_text(Path(name), "text"), f"text {name} is {kind} by its ending", ": ", ".")


def test_other_endings_are_read() -> None:
    for other in ("a.txt", "a.md", "a", "a.py", "a.jsonl", "a.tex", "a.rst", "a.srt"):
        refuse_no_text(Path(other), "text")


def test_a_file_is_unpacked_by_its_first_bytes(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed.txt"
    plain.write_bytes(b"see")
    packed.write_bytes(gzip.compress(b"see" * 50_000))
    assert not is_compressed(plain) and is_compressed(packed)
    assert "".join(read_text(plain, "text")) == "see" and "".join(read_text(packed, "text")) == "see" * 50_000
    refused(lambda: next(read_bytes(tmp_path / "none", "rows")), f"rows {tmp_path / 'none'} cannot be read: No such")
