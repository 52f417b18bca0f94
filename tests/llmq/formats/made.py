"""What the tests of readers share: stored tensors as headers tell of them, and an IntWeight taken apart by numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from llmq.checkpoint.tensors import TensorInfo
from llmq.formats.plain import Entry, IntWeight

FILE = Path("/a/model.safetensors")


def stored(tensors: Mapping[str, Tensor], module: str = "block.up") -> dict[str, TensorInfo]:
    """Suffix → what a file's header says of a module's tensor."""
    return {
        suffix: TensorInfo(f"{module}.{suffix}", t.dtype, tuple(t.shape), FILE, 0, t.nbytes)
        for suffix, t in tensors.items()
    }


def fits(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are what a layer says that they must be."""
    return all(tensors[s].dtype in e.dtypes and tuple(tensors[s].shape) == e.shape for s, e in entries.items())


def codes(words: Tensor, bits: int, width: int) -> np.ndarray:
    """int32 [rows, words] → signed codes [rows, width]: bit by bit from the dense little-endian stream."""
    rows = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in words.numpy()]
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    return np.array([[(row >> (i * bits) & mask) - offset for i in range(width)] for row in rows])


def dense(weight: IntWeight) -> np.ndarray:
    """The weight [out, in] that is meant, in float64."""
    group = np.arange(weight.in_features) // weight.group_size
    zero = 0 if weight.zero is None else weight.zero.numpy().astype(int)[:, group]
    scale = weight.scale.double().numpy()[:, group]
    value = (codes(weight.words, weight.bits, weight.in_features) - zero) * scale
    if weight.order is None:
        return value
    out = np.empty_like(value)
    out[:, weight.order.numpy()] = value
    return out
