"""Rows of known weights, found again in other tensors by their bytes.

A converter that permutes, joins or splits weights moves whole rows of them; nothing else must be known of it. A row is
known by 64 bits of a hash of its numbers, so whoever uses what is found compares the numbers afterwards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """Where the rows of a tensor come from: weight and row of each, int64 [rows]."""

    weights: Numbers
    rows: Numbers

    def parts(self) -> list[tuple[int, Tensor, Tensor]]:
        """For each weight that has rows here: its number, the rows of the tensor, and the weight's rows for them."""
        made = []
        for weight in dict.fromkeys(self.weights.tolist()):
            here = np.flatnonzero(self.weights == weight)
            made.append((weight, torch.from_numpy(here), torch.from_numpy(self.rows[here])))
        return made


def keys(rows: Tensor) -> npt.NDArray[np.uint64]:
    """A number for each row of a float tensor [rows, width], by its bytes: uint64 [rows]. −0 counts as 0."""
    # Two zeros are the same number, and converters may turn one into the other.
    plain = (rows + 0.0).contiguous().view(torch.uint8).numpy()
    found = (hashlib.blake2b(row.data, digest_size=8).digest() for row in plain)
    return np.frombuffer(b"".join(found), dtype=np.uint64)


class RowIndex:
    """The rows of all weights. `add` each weight once, in order; then `find`."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.uint64]] = []
        self._sorted: tuple[npt.NDArray[np.uint64], Numbers, Numbers] | None = None

    def add(self, rows: Tensor) -> None:
        """The next weight, a float tensor [out, in]."""
        self._parts.append(keys(rows))
        self._sorted = None

    def find(self, rows: Tensor) -> Found | None:
        """Where every row of a float tensor comes from, None if some row is none of a weight's.

        Of equal rows, the one after the row before is taken, else one of a weight that has other rows here.
        """
        known, weights, places = self._ready()
        wanted = keys(rows)
        first, last = np.searchsorted(known, wanted, "left"), np.searchsorted(known, wanted, "right")
        if len(known) == 0 or bool((first == last).any()):
            return None
        at = first.copy()
        several = np.flatnonzero(last - first > 1)
        alone = set(weights[first[last - first == 1]].tolist())
        for row in several.tolist():
            some = range(int(first[row]), int(last[row]))
            before = int(at[row - 1]) if row else -1
            next_one = [i for i in some if row and weights[i] == weights[before] and places[i] == places[before] + 1]
            at[row] = (next_one or [i for i in some if int(weights[i]) in alone] or [some[0]])[0]
        return Found(weights[at], places[at])

    def _ready(self) -> tuple[npt.NDArray[np.uint64], Numbers, Numbers]:
        """All keys in ascending order, with the weight and the row of each."""
        if self._sorted is None:
            sizes = [len(part) for part in self._parts]
            known = np.concatenate(self._parts) if self._parts else np.empty(0, np.uint64)
            weights = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
            places = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes] or [np.empty(0, np.int64)])
            order = np.argsort(known, kind="stable")
            self._sorted = known[order], weights[order], places[order]
        return self._sorted
