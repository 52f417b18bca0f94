"""Check that an output folder is new, or belongs to llmq and to this run; any other folder is refused untouched."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError

STATE = ".llmq"
FINGERPRINT = "fingerprint.json"


def refuse_foreign(out: Path) -> None:
    """Raises LlmqError if the folder holds files that llmq did not write.

    Accepted are a missing or empty folder, one with a fingerprint, and one with only files that llmq writes before it.
    """
    if not out.exists() or (out / STATE / FINGERPRINT).exists():
        return
    if not out.is_dir():
        raise LlmqError(f"{out} is a file, not a folder: choose another folder")
    foreign = sorted(path.name for path in out.iterdir() if path.name != STATE)
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise LlmqError(f"{out} holds other files ({foreign[0]}{others}): choose a new or an empty folder")


def take_lock(out: Path) -> int:
    """The descriptor that holds the folder's lock until it is closed. Raises LlmqError if another llmq has it."""
    fd = os.open(out / STATE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise LlmqError(f"another llmq is writing to {out}: wait for it, or choose another folder") from error
    except OSError:
        pass  # A file system without locks: writing without a lock is better than refusing.
    return fd


def compare(out: Path, wanted: Mapping[str, Any]) -> None:
    """Raises LlmqError, naming what differs, if the folder's fingerprint is not the wanted one."""
    way_out = "choose another folder, or delete this one to start again"
    stored = out / STATE / FINGERPRINT
    try:
        before = dict(_leaves(json.loads(stored.read_bytes())))
    except ValueError as error:
        raise LlmqError(f"{stored} is damaged, so nothing can be resumed: {way_out}") from error
    after = dict(_leaves(wanted))
    keys = [key for key in {**before, **after} if (key in before, before.get(key)) != (key in after, after.get(key))]
    if keys:
        shown = [f"{_words(key)} {_short(before.get(key))} → {_short(after.get(key))}" for key in keys[:8]]
        more = f", and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise LlmqError(f"{out} holds another run ({', '.join(shown)}{more}): {way_out}")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value of nested mappings with the keys that lead to it."""
    if isinstance(value, dict) and value:
        for key in sorted(value):
            yield from _leaves(value[key], (*path, key))
    else:
        yield path, value


def _words(path: tuple[str, ...]) -> str:
    """('recipe', 'scheme', 'bits') is 'recipe: scheme.bits'."""
    return path[0] + (": " + ".".join(path[1:]) if path[1:] else "") if path else "all"


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…"
