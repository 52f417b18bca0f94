"""What a killed pass over all blocks goes on from: its hidden states after a block, on disk from time to time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint import files
from llmq.discovery.calls import States
from llmq.errors import LlmqError

EVERY = 30.0
SHARE = 10.0
"""At least so many seconds, and so many times what the last one took, lie between two snapshots."""


@dataclass(frozen=True)
class Kept:
    """The next block, the states of each chain of hidden states (batch by batch, maybe none), and other tensors."""

    block: int
    states: list[list[States]]
    tensors: dict[str, Tensor]


class Snapshot:
    """Snapshots in a folder; folder None: none are kept. blocks: the number of the model's blocks.

    Where blocks hand more to each other than hidden states, none are kept either: such values may be of any kind.
    """

    def __init__(self, folder: Path | None, blocks: int) -> None:
        self.folder, self.blocks = folder, blocks
        self._next = time.monotonic() + EVERY

    def offer(self, block: int, states: Sequence[Sequence[States]], tensors: Mapping[str, Tensor]) -> None:
        """Keep the state before a block, if the last snapshot is old enough. Raises LlmqError if the disk is full."""
        if self.folder is None or block == self.blocks or time.monotonic() < self._next:
            return
        if any(one.handed for chain in states for one in chain):
            return
        began = time.monotonic()
        values = {f"{i}.{j}": s.hidden.contiguous() for i, chain in enumerate(states) for j, s in enumerate(chain)}
        values |= {f"tensor.{name}": value.contiguous() for name, value in tensors.items()}
        told = {"block": str(block), "counts": json.dumps([len(chain) for chain in states])}
        path = self.folder / "snapshot.safetensors"
        partial = path.with_name(path.name + files.PARTIAL)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(values, partial, metadata=told)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise LlmqError(
                f"cannot write {path}: {error}; free some space, or name another folder in XDG_CACHE_HOME, and run the "
                "same command again"
            ) from error
        self._next = time.monotonic() + max(EVERY, SHARE * (time.monotonic() - began))

    def load(self) -> Kept | None:
        """The last snapshot; None if there is none, or it cannot be read."""
        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / "snapshot.safetensors", framework="pt") as opened:
                told = opened.metadata()
                counts: list[int] = json.loads(told["counts"])
                states = [[States(opened.get_tensor(f"{i}.{j}")) for j in range(n)] for i, n in enumerate(counts)]
                stored: list[str] = opened.keys()
                names = [name for name in stored if name.startswith("tensor.")]
                tensors = {name.removeprefix("tensor."): opened.get_tensor(name) for name in names}
                return Kept(int(told["block"]), states, tensors)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def clear(self) -> None:
        """Delete the snapshot."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
