"""The output folder while it is written: one shard per finished unit, a journal, resume, index and config at the end.

A file is written under `.llmq/`, synced, and renamed to its final name, so that a file with its final name is complete;
a journal line marks a complete unit. A killed run resumes after the last journal line. Files outside `.llmq/` do not
depend on when, or in how many runs, they were written; the index is written last.

A unit may be replaced once all are there. Its new shard waits, complete, in `.llmq/`; then a second journal line for
the unit is written; then the shard is renamed over the old one. So whenever a run is killed, each shard is whole: the
one of the unit's last line, or that of the line before while the new one still waits.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from llmq import ranks
from llmq.checkpoint.claim import FINGERPRINT, STATE, compare, refuse_foreign, take_lock
from llmq.checkpoint.files import INDEX, PARTIAL, put, sync_folder, write_all
from llmq.checkpoint.journal import JOURNAL, WAITING, install, listed, parse, pieces_of, sound
from llmq.checkpoint.tensors import TensorInfo, encode, read_header, read_tensor
from llmq.errors import LlmqError

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class Sink:
    """The output folder of one run. Made by Sink.open; close it, or use it as a context manager, to release its lock.

    done: the payload of every committed unit, in order, as it was committed (after a trip through JSON).
    finished: the index and config are written too. notes: damage found on resume, one line each.
    """

    def __init__(self, out: Path, units: int, lock: int) -> None:
        self.out = out
        self.units = units
        self.done: dict[str, dict[str, Any]] = {}
        self.finished = False
        self.notes: list[str] = []
        self._state = out / STATE
        self._lock = lock
        self._journal = -1
        self._entries: dict[str, dict[str, Any]] = {}
        self._unit_of: dict[str, str] = {}
        self._infos: dict[str, dict[str, TensorInfo]] = {}

    @classmethod
    def open(cls, out: Path, fingerprint: Mapping[str, Any], units: int) -> Self:
        """Open an empty or new folder, or resume one whose run has the same fingerprint and number of units.

        fingerprint: everything that the written bytes depend on, as nested JSON data. Raises LlmqError, changing
        nothing in the folder, if it holds another run (naming what differs) or other files, another llmq process has it
        open, or it cannot be written.
        """
        out = Path(out)
        wanted = json.loads(json.dumps({**fingerprint, "blocks": units}))
        created: list[Path] = []
        sink: Self | None = None
        try:
            refuse_foreign(out)
            for folder in (out, out / STATE):
                if not folder.is_dir():
                    folder.mkdir(parents=True)
                    created.insert(0, folder)
            sink = cls(out, units, take_lock(out))
            stored = sink._state / FINGERPRINT
            if stored.exists():
                compare(out, wanted)
            else:
                refuse_foreign(out)
                text = json.dumps(wanted, indent=2, sort_keys=True) + "\n"
                sink._put(stored, [memoryview(text.encode())], len(text.encode()))
            sink._recover()
        except BaseException as error:
            if sink is not None:
                sink.close()
            if created and not (out / STATE / FINGERPRINT).exists():
                with contextlib.suppress(OSError):
                    (out / STATE / "lock").unlink(missing_ok=True)
                    for folder in created:
                        folder.rmdir()
            if isinstance(error, OSError):
                raise LlmqError(f"cannot write to {out}: {error.strerror}; choose another folder") from error
            raise
        return sink

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; the folder stays as it is."""
        for fd in (self._journal, self._lock):
            if fd >= 0:
                os.close(fd)
        self._journal = self._lock = -1

    def commit(self, unit: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
        """Write a unit's tensors as the next shard, and its journal line; once this returns, the unit survives a crash.

        Raises LlmqError if the disk is full or fails (the unit's files are then deleted, earlier units are kept),
        ValueError if the unit or one of its tensors is committed already, or if there are more units than announced.
        """
        if unit in self._entries or len(self._entries) >= self.units:
            raise ValueError(f"{unit} is committed already, or is one more than the {self.units} announced")
        taken = self._unit_of.keys() & tensors.keys()
        if taken:
            raise ValueError(f"{unit}: {sorted(taken)} are in earlier units")
        kept = json.loads(json.dumps(dict(payload)))
        entry: dict[str, Any] = {"unit": unit, "shard": None, "size": 0, "sha256": "", "tensors": {}}
        shard = self.out / f"model-{len(self._entries) + 1:05d}-of-{self.units:05d}.safetensors"
        if tensors:
            size, pieces = encode(tensors)
            entry |= {"shard": shard.name, "size": size, "sha256": self._put(shard, pieces, size)}
            entry |= {"tensors": listed(tensors)}
        try:
            self._append({**entry, "payload": kept})
        except LlmqError:
            shard.unlink(missing_ok=True)
            raise

    def replace(self, unit: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
        """Replace the tensors of a committed unit, of the same names, and its payload: after a crash it has the old or
        the new ones, never some of both.

        Raises LlmqError as commit does, ValueError if the unit is not committed, or has tensors of other names.
        """
        old = self._entries.get(unit)
        if old is None or tensors.keys() != old["tensors"].keys():
            raise ValueError(f"{unit} is not committed, or has other tensors")
        entry, waiting = dict(old), self._state / f"{old['shard']}{WAITING}"
        if tensors:
            size, pieces = encode(tensors)
            entry |= {"size": size, "sha256": self._put(waiting, pieces, size), "tensors": listed(tensors)}
        try:
            self._append({**entry, "payload": json.loads(json.dumps(dict(payload)))})
        except LlmqError:
            waiting.unlink(missing_ok=True)
            raise
        if tensors:
            try:
                install(waiting, self.out)
            except OSError as error:
                raise self._failed(entry["shard"], entry["size"], error) from error
        self._infos.pop(unit, None)

    def record(self, name: str, payload: Mapping[str, Any]) -> None:
        """Keep a payload in the journal that belongs to no unit. Raises LlmqError as commit does."""
        entry: dict[str, Any] = {"unit": name, "shard": None, "size": 0, "sha256": "", "tensors": {}, "aside": True}
        self._append({**entry, "payload": json.loads(json.dumps(dict(payload)))})

    def state_of(self, name: str) -> Path:
        """A folder under `.llmq/` for what a stage of a run keeps to be resumed."""
        return self._state / name

    def finish(self, config: Mapping[str, Any], aux: Mapping[str, Path], extra: Mapping[str, str | bytes]) -> None:
        """Copy `aux`, write the extra files, config.json and, last, the index; the run is then finished.

        aux: name in the output folder, which may be in a folder in it → file.
        An extra file replaces a copied one of the same name. Does nothing if the run is finished already. Raises
        LlmqError if the disk is full or fails; the same call can be repeated.
        """
        if len(self._entries) != self.units:
            raise ValueError(f"{len(self._entries)} of {self.units} units are committed")
        if self.finished:
            return
        copied = {name: path for name, path in aux.items() if name not in extra}
        for name, path in copied.items():
            size, pieces = pieces_of(path)
            self._put(self.out / name, pieces, size)
        for name, content in extra.items():
            self.write(name, content)
        self.write("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        weight_map = {name: self._entries[unit]["shard"] for name, unit in sorted(self._unit_of.items())}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        self.write(INDEX, json.dumps(index, indent=2) + "\n")
        self._append({"finished": sorted(set(copied) | set(extra) | {"config.json", INDEX})})

    def write(self, name: str, content: str | bytes) -> None:
        """Write OUT/name atomically, replacing any file of that name. Raises LlmqError as commit does."""
        data = content.encode() if isinstance(content, str) else content
        self._put(self.out / name, [memoryview(data)], len(data))

    def infos(self, unit: str) -> dict[str, TensorInfo]:
        """The tensors of a unit as on disk. Raises KeyError if it is not committed, LlmqError if it is damaged."""
        if unit not in self._infos:
            shard = self._entries[unit]["shard"]
            self._infos[unit] = read_header(self.out / shard) if shard else {}
        return self._infos[unit]

    def read_unit(self, unit: str) -> dict[str, Tensor]:
        """The tensors of a committed unit, read back from disk. Raises as infos."""
        return {name: read_tensor(info) for name, info in self.infos(unit).items()}

    def read(self, name: str) -> Tensor:
        """One tensor of any committed unit, read back from disk. Raises as infos."""
        return read_tensor(self.infos(self._unit_of[name])[name])

    def unit_of(self, name: str) -> str | None:
        """The unit that a tensor was committed with; None if it was not."""
        return self._unit_of.get(name)

    def digest(self) -> str:
        """A digest of all committed shards."""
        return hashlib.sha256("".join(entry["sha256"] for entry in self._entries.values()).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all committed tensors."""
        return sum(nbytes for entry in self._entries.values() for _, _, nbytes in entry["tensors"].values())

    def _recover(self) -> None:
        """Read the journal up to the first invalid line, truncate it there, and delete shards that it does not list."""
        path = self._state / JOURNAL
        self._journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        lines = path.read_bytes().splitlines(keepends=True)
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines):
            entry = parse(line)
            if entry is None:
                if line.endswith(b"\n"):
                    self.notes.append(
                        f"line {number + 1} of {path} is damaged: that unit and all later ones are done again"
                    )
                break
            entries.append(entry)
            if "finished" in entry:
                break
        good, told = sound(self.out, entries)
        self.notes += told
        for entry in entries[:good]:
            if "finished" in entry:
                self.finished = True
            else:
                self._note(entry)
        good = sum(map(len, lines[:good]))
        if good < sum(map(len, lines)):
            os.ftruncate(self._journal, good)
            os.fsync(self._journal)
        known = {entry["shard"] for entry in self._entries.values()}
        for stray in [*self._state.glob("*" + PARTIAL), *self._state.glob("*" + WAITING), *self.out.iterdir()]:
            of_ours = stray.suffix in (PARTIAL, WAITING) or _SHARD.fullmatch(stray.name) or stray.name == INDEX
            if of_ours and stray.name not in known and not (stray.name == INDEX and self.finished):
                stray.unlink()
        sync_folder(self._state)

    def _note(self, entry: dict[str, Any]) -> None:
        self.done[entry["unit"]] = entry.pop("payload")
        if entry.get("aside"):
            return
        self._entries[entry["unit"]] = entry
        self._unit_of |= dict.fromkeys(entry["tensors"], entry["unit"])

    def _append(self, entry: dict[str, Any]) -> None:
        """Add a line to the journal and sync it; memory keeps the parsed line, exactly what a resume would read."""
        line = json.dumps(entry).encode() + b"\n"
        before = os.fstat(self._journal).st_size
        try:
            write_all(self._journal, memoryview(line))
            os.fsync(self._journal)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._journal, before)
            raise self._failed("the journal", len(line), error) from error
        self._take(line)
        ranks.tell(line)

    def _take(self, line: bytes) -> None:
        """Note a line of the journal."""
        entry = json.loads(line)
        if "unit" in entry:
            self._note(entry)
        else:
            self.finished = True

    def _put(self, path: Path, pieces: Iterable[memoryview], size: int) -> str:
        """Write a file atomically; returns its sha256. Raises LlmqError if the disk is full or fails."""
        try:
            if not path.parent.is_dir():
                path.parent.mkdir()
                sync_folder(path.parent.parent)
            return put(path, pieces, self._state / (path.name + PARTIAL))
        except OSError as error:
            raise self._failed(path.name, size, error) from error

    def _failed(self, what: str, needed: int, error: OSError) -> LlmqError:
        kept = f"{len(self._entries)} of {self.units} blocks are kept"
        if error.errno in _NO_ROOM:
            stat = os.statvfs(self.out)
            free = stat.f_bavail * stat.f_frsize
            return LlmqError(
                f"disk full while writing {what} in {self.out}: {needed:,} bytes needed, {free:,} free; "
                f"free some space and run the same command again: {kept}"
            )
        return LlmqError(
            f"cannot write {what} in {self.out}: {error.strerror}; mend that and run the same command again: {kept}"
        )
