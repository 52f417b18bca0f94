"""What an evaluation has finished, line by line on disk: a killed one goes on from there, with the same numbers."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from llmq.errors import LlmqError


class Journal:
    """A file of finished pieces by name; `add` writes a batch of them at once, and a torn last line is left out.

    Numbers come back exactly as they were: JSON holds every digit of a float. file: None keeps them in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.done: dict[str, Any] = {}
        self._out: TextIO | None = None
        if file is not None:
            self.done = _read(file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What a full disk did not take was told when it was written.
        with contextlib.suppress(OSError):
            if self._out is not None:
                self._out.close()

    def add(self, pieces: Mapping[str, Any]) -> None:
        """Keep finished pieces: all of them or, if the process is killed meanwhile, none. Raises LlmqError."""
        self.done.update(pieces)
        if self.file is None or not pieces:
            return
        try:
            if self._out is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                torn = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
                self._out = self.file.open("a", encoding="utf-8")
                # What was cut off stays as a line of its own, which no reader understands or takes for another.
                self._out.write("\n" if torn else "")
            text = json.dumps(pieces)
            self._out.write(f"{_sum(text)} {text}\n")
            self._out.flush()
        except OSError as error:
            raise LlmqError(f"{self.file} cannot be written: {error.strerror}; give another folder as --out") from error

    def remove(self) -> None:
        """Take the file away: its results are kept elsewhere."""
        if self._out is not None:
            self._out.close()
            self._out = None
        if self.file is not None:
            self.file.unlink(missing_ok=True)


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
    """What tells a line that was cut off, or damaged, from one that was written."""
    return f"{zlib.crc32(text.encode()):08x}"
