"""The container of a GGUF file, version 3 (ggml's docs/gguf.md): read, and written with other tensors.

`GGUF`, version, number of tensors and of entries; the entries (name, type, value); for each tensor its name, sizes (of
the innermost axis first), type and offset; then the tensors, each at a multiple of `general.alignment`. All numbers are
little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.gguf.types import DTYPES, NUMBERS, BlockType, of_number

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
FILE_TYPE, ALIGNMENT = "general.file_type", "general.alignment"
DEEP = 4
"""Arrays within arrays that are read at most."""


@dataclass(frozen=True)
class Held:
    """A tensor of a file. shape: the outermost axis first, as torch has it; begin: in the file."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    begin: int

    @property
    def rows(self) -> int:
        """The number of rows, which are as long as the last axis."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.shape[-1] // self.kind.values * self.kind.nbytes

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Contents:
    """A file's entries and tensors. entries: name → value (of an array, its length); raw: the bytes of all entries;
    places: name → where its value begins in `raw`."""

    path: Path
    entries: dict[str, Any]
    raw: bytes
    places: dict[str, int]
    tensors: tuple[Held, ...]

    @property
    def alignment(self) -> int:
        """Of the tensors, in bytes."""
        return int(self.entries.get(ALIGNMENT, 32))

    def read(self, held: Held, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop−1 of a tensor, all by default: in its own dtype if that is plain, else uint8 [rows, bytes].

        Raises LlmqError if the file cannot be read or became shorter.
        """
        count = (held.rows if stop is None else stop) - start
        buffer = torch.empty(count * held.row_bytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(held.begin + start * held.row_bytes)
                got = file.readinto(buffer.numpy().data) if len(buffer) else 0
        except OSError as error:
            raise LlmqError(f"cannot read {held.name} from {self.path}: {error.strerror}") from error
        if got != len(buffer):
            raise LlmqError(f"{self.path} is truncated: {held.name} is not whole; make or download it again")
        plain = held.kind.kind == "plain"
        return buffer.view(DTYPES[held.kind.name]).view(count, -1) if plain else buffer.view(count, -1)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Contents:
    """The entries and tensors of a file; of its data nothing.

    Raises LlmqError if it cannot be read, is no GGUF of version 2 or 3, is truncated, or has types that are not known.
    """
    try:
        with path.open("rb") as file:
            return _Reading(path, file).contents()
    except OSError as error:
        raise LlmqError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, ValueError, RecursionError, MemoryError) as error:
        raise LlmqError(f"{path} is no whole GGUF file; make or download it again") from error


class _Reading:
    """A file while its header is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size

    def contents(self) -> Contents:
        """See `read`."""
        magic, version, tensors, count = struct.unpack("<4sIQQ", self._take(24))
        if magic != MAGIC or version not in VERSIONS:
            raise LlmqError(f"{self.path} is no GGUF file of version 2 or 3, which llmq reads")
        start = self.file.tell()
        entries: dict[str, Any] = {}
        places: dict[str, int] = {}
        for _ in range(count):
            name = self._text()
            type_of_value = self._number("I")
            places[name] = self.file.tell() - start
            entries[name] = self._value(type_of_value)
        end = self.file.tell()
        found = []
        for _ in range(tensors):
            name = self._text()
            sizes = struct.unpack(f"<{(n := self._number('I'))}Q", self._take(8 * n))
            kind = of_number(self._number("I"), f"{self.path}: {name}")
            found.append((name, tuple(reversed(sizes)), kind, self._number("Q")))
        after, alignment = self.file.tell(), int(entries.get(ALIGNMENT, 32))
        if alignment < 1:
            raise ValueError("alignment")
        data = -(-after // alignment) * alignment
        held = tuple(Held(name, shape, kind, data + offset) for name, shape, kind, offset in found)
        for one in held:
            if not one.shape or one.shape[-1] % one.kind.values:
                raise LlmqError(f"{self.path}: {one.name} {[*one.shape]} is not made of blocks of {one.kind.name}")
            if one.begin + one.nbytes > self.size:
                raise LlmqError(f"{self.path} is truncated: {one.name} is not whole; make or download it again")
        self.file.seek(start)
        return Contents(self.path, entries, self._take(end - start), places, held)

    def _take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError("truncated")
        return self.file.read(count)

    def _number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self._take(struct.calcsize(kind)))[0])

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A value; of an array, its length."""
        if kind in SCALARS:
            return struct.unpack(f"<{SCALARS[kind]}", self._take(struct.calcsize(SCALARS[kind])))[0]
        if kind == TEXT:
            return self._text()
        if kind != ARRAY or depth > DEEP:
            raise ValueError(f"a value of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            self._take(count * struct.calcsize(SCALARS[inner]))
        else:
            for _ in range(count):
                self._value(inner, depth + 1)
        return count


@dataclass(frozen=True)
class New:
    """A tensor to write: its shape with the outermost axis first, its type."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return prod(self.shape) // self.kind.values * self.kind.nbytes


def encode(
    old: Contents, tensors: list[New], file_type: int | None, data: Iterable[Iterable[Tensor]]
) -> Iterator[memoryview]:
    """A file with the entries of another and these tensors, in pieces.

    file_type: what `general.file_type` is set to, where the file has one; data: for each tensor, pieces of its bytes in
    order, uint8 of any shape.
    """
    raw = bytearray(old.raw)
    if file_type is not None and FILE_TYPE in old.places:
        struct.pack_into("<I", raw, old.places[FILE_TYPE], file_type)
    head = bytearray(struct.pack("<4sIQQ", MAGIC, VERSIONS[-1], len(tensors), len(old.entries)) + raw)
    offset, step = 0, old.alignment
    for one in tensors:
        name = one.name.encode()
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(one.shape))
        head += struct.pack(f"<{len(one.shape)}Q", *reversed(one.shape))
        head += struct.pack("<IQ", one.kind.number, offset)
        offset += -(-one.nbytes // step) * step
    yield memoryview(bytes(head) + bytes(-len(head) % step))
    for one, pieces in zip(tensors, data, strict=True):
        written = 0
        for piece in pieces:
            view: memoryview = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            written += len(view)
            yield view
        assert written == one.nbytes, f"{one.name}: {written} bytes of {one.nbytes}"
        yield memoryview(bytes(-written % step))


def most_common(tensors: Iterable[New]) -> int | None:
    """llmq's answer to `general.file_type`: the number of the type that most bytes of matrices have."""
    sizes: dict[int, int] = {}
    for one in tensors:
        if len(one.shape) > 1 and one.kind.file_type is not None:
            sizes[one.kind.number] = sizes.get(one.kind.number, 0) + prod(one.shape)
    return NUMBERS[max(sizes, key=lambda number: sizes[number])].file_type if sizes else None
