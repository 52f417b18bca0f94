"""Where the bytes of a checkpoint's files are: on this disk (`LOCAL`), or on the hub (`remote.Remote`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

_CHUNK = 4096
_CHUNKS = 64


class Store(Protocol):
    """The files of a checkpoint, by the paths that they have, or would have, in its folder."""

    def size(self, path: Path) -> int | None:
        """Bytes of a file; None if there is no such file. Raises OSError or LlmqError."""

    def read(self, path: Path, begin: int, into: memoryview) -> int:
        """Bytes of a file from `begin` on; returns how many: fewer than asked for only at its end.

        Raises OSError or LlmqError.
        """

    def proof(self, path: Path) -> Iterator[bytes]:
        """What identifies the contents of a safetensors file, without reading all of it. Raises OSError."""

    def told(self, bytes: int) -> tuple[str, ...]:
        """What a plan tells of how that many bytes of tensors are read."""


class Local:
    """Files on a disk of this machine."""

    def size(self, path: Path) -> int | None:
        """See `Store.size`."""
        return path.stat().st_size if path.is_file() else None

    def read(self, path: Path, begin: int, into: memoryview) -> int:
        """See `Store.read`."""
        done = 0
        fd = os.open(path, os.O_RDONLY)
        try:
            while done < len(into) and (got := os.preadv(fd, [into[done:]], begin + done)):
                done += got
        finally:
            os.close(fd)
        return done

    def proof(self, path: Path) -> Iterator[bytes]:
        """See `Store.proof`: the header, and 64 evenly spaced samples of 4 KiB, the first and last bytes among them."""
        with path.open("rb") as file:
            size = path.stat().st_size
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
            yield header
            last = max(size - _CHUNK, len(header))
            for step in range(_CHUNKS):
                file.seek(len(header) + (last - len(header)) * step // (_CHUNKS - 1))
                yield file.read(_CHUNK)

    def told(self, bytes: int) -> tuple[str, ...]:
        """See `Store.told`: nothing."""
        return ()


LOCAL = Local()
