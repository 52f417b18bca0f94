"""The journal of an output folder: a line for each unit that is written, and how much of it is true on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.claim import STATE
from llmq.checkpoint.files import sync_folder
from llmq.checkpoint.tensors import DTYPE_NAMES
from llmq.errors import LlmqError

JOURNAL = "journal.jsonl"
WAITING = ".waiting"
"""The ending of a shard, in the state's folder, that is to replace the one of its name."""
_PIECE = 1 << 24


def sound(out: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """How many entries of a journal are kept, all before the first whose files are not there as it says; and the damage
    found.

    Shards that wait are put in their places first. A unit counts by its last entry. Where that is not kept although its
    shard is there, the unit's first one is not kept either: the shard that it tells of is gone.
    """
    places: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        if "unit" in entry:
            places.setdefault(entry["unit"], []).append(index)
    keep, told = len(entries), ""
    if entries and "finished" in entries[-1]:
        keep -= not all((out / name).is_file() for name in entries[-1]["finished"])
    on_disk: dict[str, int] = {}
    for unit, mine in places.items():
        replaced = len(mine) > 1
        wrong = _settled(out, entries[mine[-1]], replaced)
        if not wrong:
            on_disk[unit] = mine[-1]
        elif replaced and not damage(out, entries[mine[-2]]):
            on_disk[unit], keep = mine[-2], min(keep, mine[-1])
        elif mine[0] < keep:
            keep, told = mine[0], f"{wrong}: {unit} and all later units are done again"
    nowhere = len(entries)
    while gone := [m[0] for u, m in places.items() if m[0] < keep <= on_disk.get(u, nowhere)]:
        keep = min(gone)
    return keep, [told] if told else []


def _settled(out: Path, entry: Mapping[str, Any], replaced: bool) -> str | None:
    """What is wrong with an entry's shard, or None; one that waits to replace another is installed if it is whole."""
    wrong = damage(out, entry)
    waiting = out / STATE / f"{entry['shard']}{WAITING}"
    if wrong and replaced and waiting.is_file() and not damage(out / STATE, {**entry, "shard": waiting.name}):
        install(waiting, out)
        return None
    return wrong


def install(waiting: Path, out: Path) -> None:
    """Rename a shard that waits over the one that it replaces. Raises OSError."""
    waiting.rename(out / waiting.name.removesuffix(WAITING))
    sync_folder(out)


def listed(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Tensors as an entry of the journal lists them: dtype, shape and bytes."""
    found = ((name, tensors[name]) for name in sorted(tensors))
    return {name: [DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes] for name, tensor in found}


def check_finished(out: Path) -> bool:
    """Whether the folder has a run's journal. Raises LlmqError if the run is unfinished, or a shard missing or changed.

    Reads every shard once.
    """
    path = out / STATE / JOURNAL
    if not path.is_file():
        return False
    entries = [parse(line) for line in path.read_bytes().splitlines(keepends=True)]
    if not any(entry and "finished" in entry for entry in entries):
        raise LlmqError(f"{out} is not finished: run the command that writes it again to resume")
    last = {entry["unit"]: entry for entry in entries if entry and "unit" in entry}
    for entry in last.values():
        wrong = damage(out, entry)
        if wrong:
            raise LlmqError(f"{wrong}: run the command that wrote it again to repair it")
    return True


def damage(out: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a committed shard, or None."""
    if entry["shard"] is None:
        return None
    path = out / entry["shard"]
    if not path.is_file():
        return f"{path} is missing"
    size, pieces = pieces_of(path)
    if size != entry["size"]:
        return f"{path} has {size} bytes instead of {entry['size']}"
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return None if digest.hexdigest() == entry["sha256"] else f"{path} was changed since it was written"


def parse(line: bytes) -> dict[str, Any] | None:
    """A line of the journal, or None if it is incomplete or damaged."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    whole = isinstance(entry, dict) and ("finished" in entry or {"unit", "shard", "size", "payload"} <= entry.keys())
    return entry if whole else None


def pieces_of(path: Path) -> tuple[int, Iterator[memoryview]]:
    """A file's size and content, piece by piece. Raises LlmqError when it can not be read."""

    def pieces() -> Iterator[memoryview]:
        try:
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    yield memoryview(piece)
        except OSError as error:
            raise LlmqError(f"cannot read {path}: {error.strerror}") from error

    try:
        return path.stat().st_size, pieces()
    except OSError as error:
        raise LlmqError(f"cannot read {path}: {error.strerror}") from error
