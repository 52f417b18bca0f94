"""What every format here has: one file or folder for each, which holds all that llmq knows of it.

A format that llmq writes has the functions of `Format`; the grids that it stores name it (`grids.table`). What a file
of any of these has beside that is asked for part by part, and may be missing:

- READERS: what config.json calls the method → the reader that brings its weights to llmq's kernels (`plain.Reader`),
  whether transformers knows the method or not;
- PACKAGES: what config.json calls the method → the package that stock transformers needs to read it;
- STOCK_UNPACKS: whether stock transformers makes weights of PACKAGES dense to run them;
- claims(section): whether a configuration that names no method is of one of PACKAGES;
- COMPANIONS, SCALES, inspect: the weights of any folder, for `llmq inspect` (`inspection`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme

Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""What a weight becomes on disk: suffix → (dtype, shape)."""
Groups = Mapping[Scheme, Sequence[str]]
"""The names of the modules that have each scheme."""


@dataclass(frozen=True)
class Loader:
    """Who reads a folder, in a sentence.

    works: None where it was not tried; False makes the plan warn. code: whose lines the model card shows for it, None
    where it shows none.
    """

    sentence: str
    works: bool | None = True
    code: Literal["transformers", "vllm"] | None = None


class Format(Protocol):
    """A format that llmq writes: a module with these functions.

    ONE_SCHEME: whether all weights of a folder have the same scheme.
    """

    ONE_SCHEME: bool

    def spec(self, shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
        """What a weight [out, in] becomes. Raises LlmqError when the groups do not divide the inputs."""

    def pack(self, q: Any) -> dict[str, Tensor]:
        """The tensors to store, by suffix, as `spec` says. q: a Quantized, of the kind that the grid's rounding makes.

        Raises LlmqError where a part of it is missing.
        """

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        """The inverse of `pack`. Raises LlmqError when tensors are missing or misshapen."""

    def splits(self, shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
        """Whether a server can cut a weight [out, in] into equal parts along its outputs, or (row_parallel) inputs."""

    def config(self, groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint whose model computes in `dtype`.

        ignore: the names of linear modules left alone. Names as in the checkpoint, without '.weight'. Raises LlmqError
        when nothing is quantized, or the configuration cannot say what the folder holds.
        """

    def title(self, schemes: Collection[Scheme]) -> str:
        """The format's name for people."""

    def loaders(self, schemes: Collection[Scheme]) -> list[Loader]:
        """Who reads a folder with these schemes."""


@dataclass(frozen=True)
class Row:
    """One weight of any folder. bits and group None: stored as it is, in dtype; group 0: one scale per output channel.

    error: relative error, from the folder's report, where there is one. nbytes: with scales and all that belongs to it.
    kind: 'int', 'float', 'nf4' …, or 'plain'.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    bits: int | None
    group: int | None
    symmetric: bool | None
    error: float | None
    nbytes: int
    dtype: str

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)


SMALL = 1 << 16
"""Bytes of a tensor that an inspection may read."""


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 → 'float16'."""
    return str(dtype).removeprefix("torch.")
