"""What a run does without where memory is limited, and tensors in files instead of memory.

A spilled tensor is like any other, but its memory is mapped from a file without a name, which is gone with the tensor,
or with the process however that ends. `rest` takes its pages out of the process; they come back from the file, or from
the system's copy of it, when they are used. Outside of `saving`, every function here is the identity.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmq.errors import LlmqError
from llmq.machine import size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
SLAB = 64 * 2**20
"""Bytes of a file, at least: many tensors share one, as each file counts towards the system's limit of open ones."""

SHARE = 64
"""A new file of hidden states has this part of those that are in files, if that is more."""


class Saving(IntEnum):
    """How much is done to need less memory; each level includes those before it.

    PRODUCTS: what runs of a block computed is not kept for later runs. STATES: hidden states are in files. PASSES:
    statistics are collected in several passes, and weights and matrices that wait are in files.
    """

    NONE = 0
    PRODUCTS = 1
    STATES = 2
    PASSES = 3


@dataclass
class _State:
    """What this run saves. folder: where files are; slabs: by kind, the file that is filled now, and up to where."""

    level: Saving = Saving.NONE
    folder: Path | None = None
    slabs: dict[Saving, tuple[mmap.mmap, int]] = field(default_factory=dict)
    mapped: list[tuple[int, weakref.ref[mmap.mmap], Saving]] = field(default_factory=list)


_state = _State()


@contextmanager
def saving(level: Saving, folder: Path) -> Iterator[None]:
    """Within the context, memory is saved. folder: for files, which nobody sees; it must exist."""
    global _state
    before, _state = _state, _State(level, folder)
    try:
        yield
    finally:
        _state = before


def saves(level: Saving) -> bool:
    """Whether this much is done to save memory."""
    return _state.level >= level


def keep(tensor: Tensor, level: Saving) -> Tensor:
    """A tensor with the same values in a file, if this much is saved and it is in the host's memory; else itself."""
    if not saves(level) or tensor.device.type != "cpu" or not tensor.nbytes:
        return tensor
    kept = _mapped(tuple(tensor.shape), tensor.dtype, level)
    kept.copy_(tensor.detach())
    rest_one(kept)
    return kept


def keep_all(value: T, level: Saving) -> T:
    """A dataclass with all tensors in it as `keep` has them."""
    import torch

    if not saves(level) or not is_dataclass(value) or isinstance(value, type):
        return value
    fields = {one.name: getattr(value, one.name) for one in dataclass_fields(value) if one.init}
    kept = {name: keep(part, level) for name, part in fields.items() if isinstance(part, torch.Tensor)}
    return replace(value, **kept)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, level: Saving) -> Tensor:
    """A new tensor of zeros; in a file if this much is saved and the device is the host."""
    import torch

    if not saves(level) or device.type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    # What is added to a file is zero.
    return _mapped(shape, dtype, level)


def rest(level: Saving | None = None) -> None:
    """Take the pages of all spilled tensors out of memory, or of those that are spilled at this level."""
    if not saves(Saving.STATES) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    for _, reference, kind in _state.mapped:
        slab = reference()
        if slab is not None and level in (None, kind):
            slab.madvise(mmap.MADV_DONTNEED)


def rest_one(tensor: Tensor) -> None:
    """Take the pages of a tensor out of memory, if it is spilled."""
    if not saves(Saving.STATES) or not hasattr(mmap, "MADV_DONTNEED") or not tensor.numel():
        return
    first = tensor.data_ptr()
    last = first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.itemsize
    for start, reference, _ in _state.mapped:
        slab = reference()
        if slab is not None and start <= first and last < start + len(slab):
            begin = (first - start) // mmap.PAGESIZE * mmap.PAGESIZE
            slab.madvise(mmap.MADV_DONTNEED, begin, last + tensor.itemsize - start - begin)
            return


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, level: Saving) -> Tensor:
    """A new tensor in a file, of zeros."""
    import torch

    nbytes = prod(shape) * dtype.itemsize
    slab, used = _state.slabs.get(level, (None, 0))
    most = _slab(level)
    if slab is None or used + nbytes > len(slab):
        slab, used = _file(max(most, nbytes)), 0
        start = torch.frombuffer(slab, dtype=torch.uint8).data_ptr()
        _state.mapped = [one for one in _state.mapped if one[1]() is not None]
        _state.mapped.append((start, weakref.ref(slab), level))
    # Of each tensor pages of its own, as they rest by pages.
    _state.slabs[level] = slab, used + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    if nbytes >= most:
        del _state.slabs[level]
    return torch.frombuffer(slab, dtype=dtype, count=prod(shape), offset=used).view(shape)


def _slab(level: Saving) -> int:
    """The bytes of a new file, at least: of hidden states, which are all there until the next block has them, a part of
    what is in files already, so that any number of them takes few files."""
    slabs = (reference() for _, reference, kind in _state.mapped if kind is level is Saving.STATES)
    return max(SLAB, sum(len(slab) for slab in slabs if slab is not None) // SHARE)


def _file(nbytes: int) -> mmap.mmap:
    """The mapped memory of a new file of zeros without a name. Raises LlmqError if the disk is full or fails."""
    folder = _state.folder
    assert folder is not None
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="spilled-") as file:
            if hasattr(os, "posix_fallocate"):
                # Otherwise a full disk would end the process where memory is written.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                os.ftruncate(file.fileno(), nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise LlmqError(
                f"too many open files for what does not fit into memory and is in files in {folder}: raise the limit "
                "(ulimit -n), and run the same command again: finished blocks are kept"
            ) from error
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise LlmqError(
            f"{'disk full' if full else 'cannot write'} while {size(nbytes)} of what does not fit into memory were put "
            f"into a file in {folder}{'' if full else f' ({error.strerror})'}; free some space, or give more memory "
            "(--max-memory), and run the same command again: finished blocks are kept"
        ) from error
