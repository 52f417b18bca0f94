"""Rows of local files: JSON (an array, an object, lines), CSV, parquet. Values are exactly those that the file holds.

`datasets` reads the same formats, but infers one type for each column: it fills every object with the keys of all
others, makes 7 of "007" and null of the text "NA" in a CSV, and knows no line numbers. So text formats are read here by
Python's own json and csv, and stop where enough was read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from llmq.data.chats import chat_messages
from llmq.data.opened import decode, is_compressed, lines_of, read_bytes, read_text
from llmq.errors import LlmqError, first_line

WHAT = "calibration text"
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
ENDINGS = (*LINES, ".json", *SEPARATORS, *PARQUET)
_ONE = 'one JSON object on each line, such as {"text": …}'


@dataclass(frozen=True)
class Row:
    """where: the file and line, or the row's number, for error messages."""

    where: str
    fields: Mapping[str, Any]


def rows_of(file: Path, ending: str, what: str = WHAT) -> Iterator[Row]:
    """The rows of a file by its ending, one of ENDINGS. Raises LlmqError with the line."""
    if ending in PARQUET:
        return parquet_rows(file, what)
    if ending in SEPARATORS:
        return csv_rows(file, SEPARATORS[ending], what)
    return json_rows(file, what) if ending == ".json" else jsonl_rows(file, what)


def jsonl_rows(file: Path, what: str = WHAT) -> Iterator[Row]:
    """A JSON object, a string (a row of nothing but text) or a chat on each line. Raises LlmqError with its line."""
    text = decode(read_bytes(file, what), str(file), "save it as UTF-8, with one JSON object on each line")
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise LlmqError(f"{where} is not JSON ({first_line(error)}): {_ONE}") from error
        yield _row(where, value, _ONE)


def json_rows(file: Path, what: str = WHAT) -> Iterator[Row]:
    """The rows of a .json: an array, values one after the other, or an object with one list of rows in it.

    An array is read as far as rows are asked for. Raises LlmqError with file:line.
    """
    values = _json_values(file, what)
    first = next(values, None)
    if first is None:
        return
    begin, only, inside = first
    if not inside and isinstance(only, dict):
        second = next(values, None)
        if second is None:
            yield from _object_rows(file, begin, only)
            return
        values = chain([second], values)
    for line, value, _ in chain([first], values):
        yield _row(f"{file}:{line}", value, "an array of objects")


def _object_rows(file: Path, line: int, value: dict[str, Any]) -> Iterator[Row]:
    """The rows of a file that is one object: those of the one list in it, or the object itself."""
    lists = [
        name
        for name, held in value.items()
        if isinstance(held, list) and held and chat_messages(held) is None and all(isinstance(i, dict) for i in held)
    ]
    chats = [name for name, held in value.items() if held and chat_messages(held) is not None]
    if lists and not chats and not isinstance(value.get("text"), str):
        if len(lists) > 1:
            raise LlmqError(f"{file}:{line} holds several lists of rows ({', '.join(lists)}): write one to a file")
        for number, item in enumerate(value[lists[0]]):
            yield _row(f"{file} {lists[0]}[{number}]", item, "an array of objects")
        return
    if not chats and not any(isinstance(held, str) for held in value.values()):
        raise LlmqError(
            f"{file}:{line} is one object that is no row ({', '.join(value) or 'empty'}): write a row on each line"
        )
    yield _row(f"{file}:{line}", value, "an array of objects")


def _row(where: str, value: Any, form: str) -> Row:
    """A row of a JSON value. Raises LlmqError unless it is an object, a text or a chat."""
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, list) and value and chat_messages(value) is not None:
        value = {"messages": value}
    if not isinstance(value, dict):
        raise LlmqError(f"{where} is not a JSON object: {form}")
    return Row(where, value)


def _json_values(file: Path, what: str) -> Iterator[tuple[int, Any, bool]]:
    """Every value of an array or of a sequence: the line of its start, the value, and whether it is in an array."""
    text = _Json(file, what)
    inside = text.peek() == "["
    if inside:
        text.skip("[")
        if text.peek() == "]":
            return
    while text.peek():
        yield (text.line, text.value(), inside)
        if inside and not text.skip(","):
            if not text.skip("]"):
                text.refuse("it ends within the array" if not text.peek() else "no comma after a value")
            if text.peek():
                text.refuse("text after the array")
            return
    if inside:
        text.refuse("it ends within the array")


class _Json:
    """JSON text that is read as far as values are asked for. line: of the next character."""

    def __init__(self, file: Path, what: str) -> None:
        self.file = file
        self.chunks = read_text(file, what)
        self.held = ""
        self.at = 0
        self.line = 1
        self.parse = json.JSONDecoder(object_pairs_hook=_object).raw_decode

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.held):
                if not (character := self.held[self.at]).isspace():
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self._more():
                return ""

    def skip(self, mark: str) -> bool:
        """Whether the next character is `mark`, which is then read."""
        found = self.peek() == mark
        self.at += found
        return found

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self.parse(self.held, self.at)
            except (ValueError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated") or error.pos > len(self.held) - 16
                )
                if cut and self._more():
                    continue
                place = error.pos if isinstance(error, json.JSONDecodeError) else self.at
                self.line += self.held.count("\n", self.at, place)
                self.refuse(getattr(error, "msg", first_line(error)), error)
            self.line += self.held.count("\n", self.at, end)
            self.at = end
            return value

    def refuse(self, told: str, error: Exception | None = None) -> NoReturn:
        """Raise LlmqError with the line."""
        raise LlmqError(
            f"{self.file}:{self.line} is not JSON ({told}): an array of objects, or {_ONE}; write the file anew"
        ) from error

    def _more(self) -> bool:
        """Read on: at least as much as is held, so that a long value is not tried at each of its chunks."""
        rest = self.held[self.at :]
        read: list[str] = []
        while sum(map(len, read)) <= len(rest) and (chunk := next(self.chunks, "")):
            read.append(chunk)
        self.held, self.at = "".join([rest, *read]), 0
        return bool(read)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must be different."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has two values for {next(key for key in keys if keys.count(key) > 1)!r}")
    return made


def csv_rows(file: Path, separator: str, what: str = WHAT) -> Iterator[Row]:
    """The rows of a table whose first line names the columns; every value is text. Raises LlmqError with file:line.

    Lines end as the first does; a return or a line feed within a quoted text is a part of it.
    """
    csv.field_size_limit(2**31 - 1)
    cells = csv.reader(lines_of(read_text(file, what)), delimiter=separator, strict=True)
    names: list[str] = []
    start = 1
    try:
        for values in cells:
            where, start = f"{file}:{start}", cells.line_num + 1
            if not values or (not names and values == ["sep=", ""]):  # Excel's mark of its separator
                continue
            if not names:
                names = values
                _check_header(where, names)
            elif len(values) != len(names):
                raise LlmqError(
                    f"{where} has {len(values)} cells, and the first line names {len(names)}: "
                    f"put texts with {separator!r}, quotes or line ends in double quotes"
                )
            else:
                yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        told = first_line(error).partition(" - ")[0]
        raise LlmqError(
            f"{file}:{start} is not CSV ({told}): put texts with line ends in double quotes, and write a quote within "
            "a text twice"
        ) from error


def _check_header(where: str, names: list[str]) -> None:
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise LlmqError(f"{where} has its columns separated by {other!r}: write it with commas, or with tabs as .tsv")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LlmqError(f"{where} names {twice[0]!r} twice: give each column its own name")


def parquet_rows(file: Path, what: str = WHAT) -> Iterator[Row]:
    """The rows of a parquet file, one batch in memory at a time. Raises LlmqError if it cannot be read as parquet."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        if is_compressed(file):
            raise LlmqError(f"{what} {file} is compressed: unpack it first, parquet compresses its own columns")
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=64):
                for fields in batch.to_pylist():
                    yield Row(f"{file} row {number}", {name: stored(value) for name, value in fields.items()})
                    number += 1
    except UnicodeDecodeError as error:
        raise LlmqError(f"{what} {file} row {number} or later is not UTF-8 text: write the file anew") from error
    except (pa.ArrowException, OSError) as error:
        raise LlmqError(
            f"{what} {file} cannot be read as parquet: {first_line(error)}; write it anew, or give a .jsonl"
        ) from error


def stored(value: Any, feature: Any = None, exact: tuple[type, ...] = ()) -> Any:
    """A value of typed storage without the nulls that fill its objects: each has the keys of all. A content stays.

    feature: its type in `datasets`; values of the types `exact` are as they were written, and stay.
    """
    if exact and isinstance(feature, exact):
        return value
    if isinstance(value, dict):
        inner = feature if isinstance(feature, dict) else {}
        return {
            key: stored(held, inner.get(key), exact)
            for key, held in value.items()
            if held is not None or (key == "content" and "role" in value) or (key == "value" and "from" in value)
        }
    if isinstance(value, list):
        of = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return [stored(held, of, exact) for held in value]
    return value
