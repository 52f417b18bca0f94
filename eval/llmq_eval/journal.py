"""The journal of an evaluation: finished pieces, one per line on disk, from which a killed run resumes.

Of several ranks each has a file of its own, and any number of ranks reads them all.
"""

from __future__ import annotations

import contextlib
import glob
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from llmq import ranks
from llmq.errors import LlmqError
from llmq_eval.processes import everyone


class Journal:
    """A file of finished pieces by name; `add` writes a batch of them at once, and an incomplete last line is ignored.

    Numbers are read back exactly: JSON keeps every digit of a float. file: of rank 0, None keeps the pieces in memory
    only. done: what all ranks had finished when the journal was opened or last shared, and what this one has since.
    """

    def __init__(self, file: Path | None) -> None:
        self.whole = file
        self.file = file if file is None or ranks.first() else file.with_suffix(f".{ranks.rank()}{file.suffix}")
        self.done: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._out: TextIO | None = None
        if file is not None:
            for one in files(file):
                self._new.update(_read(one))
            self.share()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A failed write (full disk) was already reported by `add`.
        with contextlib.suppress(OSError):
            if self._out is not None:
                self._out.close()

    def add(self, pieces: Mapping[str, Any]) -> None:
        """Write finished pieces: all of them or, if the process is killed during the write, none. Raises LlmqError."""
        self.done.update(pieces)
        self._new.update(pieces)
        if self.file is None or not pieces:
            return
        try:
            if self._out is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                torn = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
                self._out = self.file.open("a", encoding="utf-8")
                # An incomplete line stays on its own; its checksum does not match, so readers skip it.
                self._out.write("\n" if torn else "")
            text = json.dumps(pieces)
            self._out.write(f"{_sum(text)} {text}\n")
            self._out.flush()
        except OSError as error:
            raise LlmqError(f"{self.file} cannot be written: {error.strerror}; give another folder as --out") from error

    def share(self) -> None:
        """Have what all ranks have finished; all of them call it."""
        for pieces in everyone(self._new):
            self.done.update(pieces)
        self._new = {}

    def remove(self) -> None:
        """Delete the files of all ranks, once their results are stored elsewhere."""
        if self._out is not None:
            self._out.close()
            self._out = None
        if self.whole is not None:
            for one in files(self.whole):
                one.unlink(missing_ok=True)


def files(file: Path) -> list[Path]:
    """The file of rank 0, and those of other ranks beside it."""
    return [file, *sorted(file.parent.glob(f"{glob.escape(file.stem)}.*{file.suffix}"))]


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return found
    except OSError as error:
        raise LlmqError(f"{file} cannot be read: {error.strerror}; remove it, or give another --out") from error
    for line in lines:
        told, _, text = line.decode("utf-8", "replace").partition(" ")
        if text and told == _sum(text):
            found.update(json.loads(text))
    return found


def _sum(text: str) -> str:
    """A line's checksum, which reveals incomplete and damaged lines."""
    return f"{zlib.crc32(text.encode()):08x}"
