"""Calibration text to token windows: packed, never padded, so that no statistic ever sees a padding token.

A plain text is tokenized as a whole and cut into consecutive windows, of which the wanted number is taken, evenly
spread. Rows (.json, .jsonl, .csv, .parquet, a streamed hub data set) are tokenized one after the other, joined with the
end-of-text token between them, and cut into windows; reading stops as soon as there are enough windows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.data.files import ENDINGS, WHAT, rows_of
from llmq.data.opened import decode, is_compressed, read_bytes, refuse_no_text, suffix
from llmq.data.rows import Row, RowReader, hub_rows
from llmq.data.tokens import encode, tokenize
from llmq.errors import LlmqError
from llmq.recipe.recipe import Calibration

WHOLE = 64 << 20
"""Larger text files (in bytes) are not tokenized as a whole, only where windows are taken."""
_LOOKED_AT = 1 << 20
"""Characters at the start of a text by which rows in JSON are known."""
_COMMA = re.compile(r"\s*,\s*")


@dataclass(frozen=True)
class Windows:
    """ids: int64 [samples, seqlen]; notes: for the user; description: the text and windows, for the report.

    first: the first window as text, special tokens included; empty if the windows were not made of a text; held: int64
    [windows, seqlen], other windows, which nothing is calibrated with, to judge the result on.
    """

    ids: Tensor
    notes: tuple[str, ...]
    description: str
    first: str = ""
    held: Tensor | None = None

    def apart(self, count: int) -> Windows:
        """Without `count` of the windows, evenly spread, or a fifth of them if that is less: these are `held`.

        A single window is kept.
        """
        rows = len(self.ids)
        if rows == 1:
            return self
        back = torch.zeros(rows, dtype=torch.bool)
        # Not the very first: it is shown to the user as that which calibrates.
        back[torch.linspace(1, rows - 1, max(1, min(count, rows // 5))).round().long()] = True
        return replace(self, ids=self.ids[~back], held=self.ids[back])

    @property
    def digest(self) -> str:
        """sha256 of the ids and their shape: the same windows, the same digest."""
        ids = self.ids.contiguous()
        return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()


def windows(calibration: Calibration, tokenizer: Any, *, seed: int = 0) -> Windows:
    """The windows that the recipe asks for: `samples` of `seqlen` tokens, or as many as the text gives, with a note.

    seed: unused so far, as windows are never chosen at random. Raises LlmqError, naming the text and the way out, if it
    is missing, unreachable, empty, too short for one window, not text, or has no column of text.
    """
    del seed
    if calibration.samples < 1 or calibration.seqlen < 2:
        raise LlmqError(
            "calibration takes at least 1 sample of at least 2 tokens, "
            f"not {calibration.samples} of {calibration.seqlen}: raise --samples or --seqlen"
        )
    found = _windows(calibration, tokenizer)
    return replace(found, first=tokenizer.decode(found.ids[0].tolist()))


def _windows(calibration: Calibration, tokenizer: Any) -> Windows:
    if calibration.text == "demo":
        if calibration.column is not None:
            raise LlmqError(f"the demo text has no column {calibration.column!r}: name a file or data set with --calib")
        from llmq import demo

        return _from_text(demo.calibration_text(), "the demo text (standard library)", calibration, tokenizer)
    file = Path(calibration.text).expanduser()
    if file.is_dir():
        raise LlmqError(f"{WHAT} {file} is a folder: give a .txt, .json, .jsonl, .csv or .parquet file")
    if not file.exists():
        return _from_rows(hub_rows(calibration), calibration.text, calibration, tokenizer)
    refuse_no_text(file, WHAT)
    if suffix(file) in ENDINGS:
        return _from_rows(rows_of(file, suffix(file)), str(file), calibration, tokenizer)
    if calibration.column is not None:
        raise LlmqError(f"{WHAT} {file} is plain text and has no column {calibration.column!r}: name no column")
    if file.stat().st_size > WHOLE:
        return _from_places(file, calibration, tokenizer)
    return _from_text(_decode(file, _read(file)), str(file), calibration, tokenizer)


def _from_text(text: str, name: str, calibration: Calibration, tokenizer: Any) -> Windows:
    """Consecutive windows of the whole text, evenly spread."""
    if not text.strip():
        raise LlmqError(f"calibration text {name} is empty: give a text of at least {calibration.seqlen} tokens")
    ids = tokenize(text, tokenizer, progress=True)
    length = calibration.seqlen
    there = len(ids) // length
    taken = min(calibration.samples, there)
    picked = [i * there // taken for i in range(taken)]
    return _made([ids[i * length : (i + 1) * length] for i in picked], len(ids), name, calibration, "evenly spread")


def _from_places(file: Path, calibration: Calibration, tokenizer: Any) -> Windows:
    """Windows of a file too large to tokenize: one from the first line after each of evenly spaced byte offsets.

    A window that would reach past the next offset is left out.
    """
    if is_compressed(file):
        raise LlmqError(f"{WHAT} {file} is large and compressed: unpack it, to take windows all over it")
    size = file.stat().st_size
    taken: list[Tensor] = []
    tokens = 0
    with file.open("rb") as source:
        for i in range(calibration.samples):
            begin, end = i * size // calibration.samples, (i + 1) * size // calibration.samples
            length = 16 * calibration.seqlen
            while True:
                source.seek(begin)
                raw = source.read(min(length, end - begin))
                ids = tokenize(_decode(file, _from_line(raw) if begin else raw, begin), tokenizer)
                if len(ids) >= calibration.seqlen or length >= end - begin:
                    break
                length *= 2
            tokens += len(ids)
            if len(ids) >= calibration.seqlen:
                taken.append(ids[: calibration.seqlen])
    return _made(taken, tokens, str(file), calibration, "at evenly spaced offsets")


def _from_line(raw: bytes) -> bytes:
    """The bytes from the start of the first whole line, or if there is none, of the first whole character."""
    at = raw.find(b"\n") + 1
    while not at and raw and raw[0] & 0xC0 == 0x80:
        raw = raw[1:]
    return raw[at:]


def _from_rows(rows: Iterable[Row], name: str, calibration: Calibration, tokenizer: Any) -> Windows:
    """Rows tokenized and joined, cut into windows as soon as there are enough tokens."""
    reader = RowReader(name, calibration.column, tokenizer)
    end = tokenizer.eos_token_id
    between = encode("\n\n", tokenizer) if end is None else [end]
    wanted = calibration.samples * calibration.seqlen
    ids: list[int] = []
    used = 0
    for row in reader.look(rows):
        text = reader.text(row)
        if not text:
            continue
        ids += encode(text, tokenizer)
        if ids[-len(between) :] != between:
            ids += between
        used += 1
        if len(ids) >= wanted:
            break
    if not used:
        raise LlmqError(f"calibration text {name} is empty: no row holds any text" + reader.reasons())
    kept = torch.tensor(ids[:wanted], dtype=torch.int64)
    full = [kept[i : i + calibration.seqlen] for i in range(0, len(kept) - calibration.seqlen + 1, calibration.seqlen)]
    how = f"the first {used} row{'s' * (used > 1)}, column {reader.column!r}"
    return _made(full, len(ids), name, calibration, how, reader.notes())


def _made(
    taken: list[Tensor], tokens: int, name: str, calibration: Calibration, how: str, notes: tuple[str, ...] = ()
) -> Windows:
    length = calibration.seqlen
    if not taken:
        raise LlmqError(
            f"calibration text {name} has only {tokens} tokens, and one window needs {length}: "
            f"lower --seqlen to {max(tokens, 2)} or less, or give more text"
        )
    if len(taken) < calibration.samples:
        notes = (
            *notes,
            f"calibration text {name} has {tokens} tokens: {len(taken)} windows of {length}, "
            f"not the {calibration.samples} asked for",
        )
    windows_ = "window" if len(taken) == 1 else "windows"
    return Windows(torch.stack(taken), notes, f"{name}: {len(taken)} {windows_} of {length} tokens, {how}")


def _read(file: Path) -> bytes:
    return b"".join(read_bytes(file, WHAT))


def _decode(file: Path, raw: bytes, begin: int | None = None) -> str:
    """The text of a file's bytes with its line ends made uniform, as Python opens text. Raises LlmqError for anything
    else, and for a text that is rows in JSON.

    begin: the bytes' offset if they are a part of the file; they may then end in the middle of a character.
    """
    ways_out = "save it as UTF-8 text, or as .jsonl, .csv or .parquet"
    text = "".join(decode([raw], str(file), ways_out, begin))
    if not begin:
        _refuse_rows(file, text, begin is None)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_rows(file: Path, text: str, whole: bool) -> None:
    """Raise LlmqError if a plain text is values in JSON: one or more objects, arrays, or texts with escapes.

    A text that only starts like one is prose: an object must be whole, an array must be all of the text or of its line,
    and texts in quotes are JSON only if every line is one and some line has an escape. whole: the text is all of it.
    """
    start = text[:_LOOKED_AT]
    if not start.lstrip()[:1] or start.lstrip()[0] not in '{["':
        return
    whole = whole and len(start) == len(text)
    if not (_is_object(start, whole) or _is_array(start, whole) or _is_texts(start, whole)):
        return
    line = 1 + text.count("\n", 0, len(text) - len(text.lstrip()))
    raise LlmqError(
        f"{WHAT} {file}:{line} holds rows in JSON, not prose: call the file .jsonl if each is on its line, else .json"
    )


def _is_object(start: str, whole: bool) -> bool:
    """Whether a text starts with an object before the end or another one, or with one in an array."""
    start = start.lstrip()
    inside = start.startswith("[")
    start = start[1:].lstrip() if inside else start
    if not start.startswith("{") or start.startswith("{}"):
        return False
    try:
        end = json.JSONDecoder().raw_decode(start)[1]
    except json.JSONDecodeError as error:
        return not whole and _is_cut(error)
    except (ValueError, RecursionError):
        return False
    return start[end:].lstrip()[:1] in ((",", "]", "") if inside else ("{", ""))


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether an error is that of JSON that ends too early."""
    return error.msg.startswith("Unterminated") or error.pos > len(error.doc) - 16


def _is_array(start: str, whole: bool) -> bool:
    """Whether a text is an array, or starts with one that ends its line before another."""
    start = start.strip()
    if not start.startswith("["):
        return False
    end = _value(start)
    if end is None:
        return not whole and _is_cut_array(start)
    rest = start[end:]
    return not rest or (not rest.partition("\n")[0].strip() and rest.lstrip().startswith("["))


def _is_cut_array(start: str) -> bool:
    """Whether the start of a text is that of an array: values with commas between, up to where it is cut."""
    at = len(start) - len(start[1:].lstrip())
    while True:
        try:
            _, at = json.JSONDecoder().raw_decode(start, at)
        except json.JSONDecodeError as error:
            return _is_cut(error)
        except (ValueError, RecursionError):
            return False
        if (comma := _COMMA.match(start, at)) is None:
            return False
        at = comma.end()


def _is_texts(start: str, whole: bool) -> bool:
    """Whether every line is a text in JSON, at least one of them with an escape."""
    lines = [line.strip() for line in start.split("\n")]
    lines = [line for line in (lines if whole else lines[:-1]) if line]
    return any("\\" in line for line in lines) and all(
        line.startswith('"') and _value(line) == len(line) for line in lines
    )


def _value(text: str) -> int | None:
    """Where the JSON value at the start of a text ends; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None
