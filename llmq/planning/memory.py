"""Predict the memory and disk that a run needs, and check that they are available."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import psutil
import torch
from torch import nn

from llmq import ranks
from llmq.errors import LlmqError
from llmq.machine import existing, locked_bytes, size
from llmq.spill import Saving

FORWARD_COPIES = 6
ROUTED_COPIES = 2.5  # of the rows of all experts' products, at the widest of them
# Kept for products of many different numbers of rows: oneDNN compiles each, and the heap is split between them.
ROUTED_EXTRA = 256 * 2**20
TRANSIENT = 96 * 2**20
REST_BYTES = 2**28
"""The most that is written as one unit of what is outside the blocks, unless one tensor is larger."""


@dataclass(frozen=True)
class Budget:
    """Predicted peaks in bytes: resident host memory, device memory (0 on the CPU), the output folder, and what is in
    files there while the run lasts, as it does not fit into memory."""

    memory: int
    device_memory: int
    disk: int
    files: int = 0


@dataclass(frozen=True)
class Load:
    """The memory in bytes to quantize one block: its parameters, its result, statistics and workspace.

    forward: what a pass of the block takes, if it is known to take more than others of its width do.
    """

    block: int
    packed: int
    statistics: int
    workspace: int
    forward: int = 0

    def then(self, experts: Load) -> Load:
        """The load of a block's streamed experts: the rest of the block and its result are still in memory."""
        return replace(experts, block=self.block + experts.block, packed=self.packed + experts.packed)

    def and_experts(self, experts: Load) -> Load:
        """The block's load with that of its experts, which are in memory with the rest and quantized after it."""
        return Load(
            self.block + experts.block,
            self.packed + experts.packed,
            max(self.statistics, experts.statistics),
            max(self.workspace, experts.workspace),
            max(self.forward, experts.forward),
        )


def predict(
    model: nn.Module,
    inside: list[str],
    outside: Collection[str],
    dtype: torch.dtype,
    ids_shape: tuple[int, int],
    batch: int,
    loads: list[Load],
    disk: int,
    device: str,
    *,
    chains: int = 3,
    between: int | None = None,
    stacks: Collection[str] = (),
    saving: Saving = Saving.NONE,
) -> Budget:
    """The peaks of a run. inside: the names of the blocks' parameters; outside: of others, those that a pass up to the
    last block reads; loads: of each block, one after the other; chains: the number of sets of hidden states (input,
    output and target; one more with a float target); between: the bytes of what goes from block to block for one
    window, hidden states and other values, if known; stacks: of the parameters, those that hold experts one below the
    other, which tell no width; saving: whether hidden states are in files, among what is done to need less memory.

    Without blocks, nothing runs. The activations (input, target and output of every window) are in host memory for any
    device.
    """
    now = psutil.Process().memory_info().rss + TRANSIENT
    if not inside:
        most = max((load.block + load.packed + load.workspace for load in loads), default=0)
        return Budget(now + most, most if device != "cpu" else 0, disk)
    hidden = hidden_width(model)
    # rtn runs one window, however many would go into a batch.
    batch = min(batch, ids_shape[0])
    if between is None:
        between = ids_shape[1] * hidden * dtype.itemsize
    activations, files = chains * ids_shape[0] * between, 0
    if saving >= Saving.STATES:
        # Those of a batch are in memory, and what is handed on beside them.
        states = ids_shape[1] * hidden * dtype.itemsize
        spilled = chains * max(0, ids_shape[0] - batch) * min(between, states)
        activations -= spilled
        files = spilled
    elif torch.device(device).type == "cuda":
        # Those of a batch are page-locked memory.
        states = batch * min(between, ids_shape[1] * hidden * dtype.itemsize)
        activations += chains * ceil(ids_shape[0] / batch) * (locked_bytes(states) - states)
    names = set(inside) - set(stacks)
    widest = max((max(p.shape) for n, p in model.named_parameters() if n in names and p.dim() > 1), default=hidden)
    forward = FORWARD_COPIES * batch * ids_shape[1] * widest * max(2, dtype.itemsize)
    embedding = sum(model.get_parameter(name).numel() for name in outside) * dtype.itemsize
    work = max(
        load.block + load.packed + load.statistics + max(load.workspace, load.forward, forward) for load in loads
    )
    recording = embedding + loads[0].block + max(forward, loads[0].forward)
    if device == "cpu":
        return Budget(now + activations + max(work, recording), 0, disk, files)
    return Budget(now + activations + max(load.block + load.packed for load in loads) + recording, work, disk, files)


def hidden_width(model: nn.Module) -> int:
    """The width of the hidden states, taken from the input embedding."""
    entry = model.get_input_embeddings()  # type: ignore[operator]
    return max((p.shape[-1] for p in entry.parameters()), default=1)


def host_memory(limit: int | None = None) -> int:
    """The bytes that this process can have in the host's memory. limit: what it may have, if that is given."""
    have = psutil.virtual_memory().available // ranks.on_this_machine() + psutil.Process().memory_info().rss
    return have if limit is None else min(have, limit)


def check_room(
    budget: Budget, out: Path | None, device: str, limit: int | None = None, *, scoring: bool = False
) -> None:
    """Raise LlmqError if the memory of the host or the device, or the output's disk, is too small for the run.

    budget: with all that can be done to need less memory; limit: the most bytes in the host's that the run may take;
    scoring: whether it is what the choice of bits takes, which none of that changes.
    """
    have = host_memory(limit)
    if scoring and budget.memory > have and limit is not None and have == limit:
        raise LlmqError(
            f"--max-memory {size(limit)}: choosing the bits needs about {size(budget.memory)}. Ways out: --max-memory "
            f"{ceil(budget.memory / 2**28) / 4:g}GiB, fewer --samples or a shorter --seqlen, or bits that were chosen "
            "on another machine (--recipe with its recipe.yaml)"
        )
    if budget.memory > have and limit is not None and have == limit:
        raise LlmqError(
            f"--max-memory {size(limit)}: this run needs at least about {size(budget.memory)}, with hidden states in "
            "files and statistics collected in passes. Ways out: --max-memory "
            f"{ceil(budget.memory / 2**28) / 4:g}GiB, fewer --samples or a shorter --seqlen, or --method rtn"
        )
    if budget.memory > have:
        raise LlmqError(
            f"this run needs about {size(budget.memory)} of memory and {size(have)} are free. "
            "Ways out: fewer --samples or a shorter --seqlen, --method rtn, or a machine with more memory"
            + (", or fewer ranks" if ranks.on_this_machine() > 1 else "")
        )
    if torch.device(device).type == "cuda" and budget.device_memory > torch.cuda.mem_get_info(device)[0]:
        raise LlmqError(
            f"this run needs about {size(budget.device_memory)} on {device} and "
            f"{size(torch.cuda.mem_get_info(device)[0])} are free. Ways out: --method rtn, or --device cpu"
        )
    if out is None:
        return
    folder = existing(out)
    free = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in out.glob("*.safetensors"))
    files = budget.files * ranks.on_this_machine()
    if budget.disk + files > free:
        more = f", and what does not fit into memory {size(files)} more," if files else ""
        raise LlmqError(
            f"{out}: the result needs {size(budget.disk)}{more} on disk and {size(free)} are free; "
            "free some space or choose another output folder"
        )


def check_writable(out: Path) -> None:
    """Raise LlmqError unless the output folder can be created or written to."""
    folder = existing(out)
    if not folder.is_dir():
        raise LlmqError(f"{folder} is a file, not a folder; choose another -o")
    if not os.access(folder, os.W_OK):
        raise LlmqError(f"{folder}: no permission to write there; choose another -o")
