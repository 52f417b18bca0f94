"""Files as text: compression by their first bytes, encoding by their byte order mark, and what is not text refused."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from llmq.errors import LlmqError, first_line

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Endings of compressed files; the ending before them says what is inside."""
CHUNK = 1 << 16
_AS_IT_IS = "take its text out into a .txt, or call it .txt if all of it, markup and all, is the text"
_EXPORT = "save its text as .txt, or its rows as .jsonl or .csv"
NO_TEXT = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml"), ("a web page", _AS_IT_IS)),
    **dict.fromkeys((".xml", ".svg", ".rss", ".tei"), ("XML", _AS_IT_IS)),
    **dict.fromkeys((".yaml", ".yml"), ("YAML", "write its rows as .jsonl, or call it .txt if all of it is the text")),
    ".ipynb": ("a notebook", "export it as .md or .txt"),
    **dict.fromkeys((".rtf", ".doc", ".docx", ".odt", ".epub", ".pdf"), ("a document", _EXPORT)),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("a spreadsheet", "save the sheet as .csv")),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), ("a table", "write it as .parquet")),
    **dict.fromkeys(
        (".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), ("an archive", "unpack it and give one of its files")
    ),
}
"""Endings of files that are neither prose nor rows: what they are, and the way out."""
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
# UTF-32's mark starts with that of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LINE_END = re.compile(r"\r?\n|\r")
_QUOTED = re.compile(r'"[^"]*"?')


def suffix(file: Path) -> str:
    """The ending that says what a file holds, in small letters: .jsonl of 'Rows.JSONL' and 'rows.jsonl.gz'.

    Of a .zip without another ending it is that of the first file in it.
    """
    endings = [ending.lower() for ending in file.suffixes]
    if endings == [".zip"] and file.is_file():
        with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            endings = [ending.lower() for name in archive.namelist()[:1] for ending in Path(name).suffixes]
    while len(endings) > 1 and endings[-1] in PACKED:
        endings.pop()
    return endings[-1] if endings else ""


def refuse_no_text(file: Path, what: str) -> None:
    """Raise LlmqError if a file's ending is that of markup, a document, a table or an archive."""
    kind, way_out = NO_TEXT.get(suffix(file), ("", ""))
    if kind:
        raise LlmqError(f"{what} {file} is {kind} by its ending, neither prose nor rows: {way_out}")


def read_bytes(file: Path, what: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, in chunks. what: 'calibration text', for errors. Raises LlmqError."""
    try:
        with file.open("rb") as raw, _unpacked(file, raw, what) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except OSError as error:
        raise LlmqError(
            f"{what} {file} cannot be read: {error.strerror or first_line(error)}; write it anew"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as error:
        told = first_line(error).rstrip(".")
        raise LlmqError(f"{what} {file} cannot be decompressed: {told}; compress it anew, or unpack it") from error


def is_compressed(file: Path) -> bool:
    """Whether a file's first bytes are those of a compressed file."""
    with file.open("rb") as raw:
        return _kind(raw.read(8)) is not None


def _kind(head: bytes) -> str | None:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def _unpacked(file: Path, raw: BinaryIO, what: str) -> Any:
    """A binary stream of the decompressed bytes."""
    kind = _kind(raw.read(8))
    raw.seek(0)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bz2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    if kind == "zip":
        archive = zipfile.ZipFile(raw)
        inside = [item for item in archive.infolist() if not item.is_dir()]
        if len(inside) != 1:
            raise LlmqError(f"{what} {file} holds {len(inside)} files: unpack it and give one of them")
        return archive.open(inside[0])
    if kind is not None:
        import pyarrow as pa  # type: ignore[import-untyped]

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind)
    return raw


def decode(
    chunks: Iterable[bytes], where: str, ways_out: str = "save it as UTF-8", begin: int | None = None
) -> Iterator[str]:
    """Text of bytes in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, which is no part of the text.

    where: the file, for errors. begin: the bytes' offset if they are a part of the file, which may end in the middle of
    a character. Raises LlmqError with file:line at the first bytes that are no text; the text before them comes first.
    """
    decoder: codecs.IncrementalDecoder | None = None
    encoding, line = "utf-8", 1
    for chunk in chain(chunks, [b""]):
        if decoder is None:
            mark, encoding = next((m for m in _MARKS if not begin and chunk.startswith(m[0])), (b"", "utf-8"))
            decoder, chunk = codecs.getincrementaldecoder(encoding)(), chunk[len(mark) :]
        error: UnicodeDecodeError | None = None
        try:
            text = decoder.decode(chunk, final=not chunk and begin is None)
        except UnicodeDecodeError as fault:
            text, error = fault.object[: fault.start].decode(encoding), fault
        if "\0" in text:
            at = _place(where, line + text[: text.index("\0")].count("\n"), begin)
            raise LlmqError(
                f"{at} is not {encoding.upper()} text: it holds zero bytes, so it is binary, or UTF-16 without a byte "
                f"order mark; {ways_out}"
            )
        if text:
            yield text
        line += text.count("\n")
        if error is not None:
            raise LlmqError(f"{_place(where, line, begin)} is not {encoding.upper()} text: {ways_out}") from error


def _place(where: str, line: int, begin: int | None) -> str:
    return f"{where}, some lines after byte {begin}," if begin else f"{where}:{line}"


def read_text(file: Path, what: str) -> Iterator[str]:
    """The file's text, decompressed and decoded, in chunks. Raises LlmqError."""
    return decode(read_bytes(file, what), str(file))


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """The lines of a text, each with its line end: a line feed, or if its first line ends otherwise, a return."""
    source = iter(chunks)
    head = list(islice(source, 1))
    if head and head[0].endswith("\r"):
        head += islice(source, 1)
    first = _LINE_END.search(_QUOTED.sub("", "".join(head)))
    end = "\r" if first is not None and first.group() == "\r" else "\n"
    held: list[str] = []
    for chunk in chain(head, source):
        begun, *rest = chunk.split(end)
        held.append(begun)
        for piece in rest:
            yield "".join(held) + end
            held = [piece]
    if any(held):
        yield "".join(held)
