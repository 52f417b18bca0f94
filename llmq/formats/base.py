"""The interface of a checkpoint format; each format has one file or folder with all code for it.

A format that llmq writes has the functions of `Format`; the grids that it stores name it (`grids.table`). All other
parts are optional:

- READERS: method in config.json → the reader of its weights for llmq's kernels (`plain.Reader`), whether or not
  transformers supports the method;
- PACKAGES: method in config.json → the package that stock transformers needs to read it;
- STOCK_UNPACKS: whether stock transformers makes the weights of PACKAGES dense to run them;
- claims(section): whether a configuration without `quant_method` is of this format;
- COMPANIONS, SCALES, inspect: descriptions of weights, for `llmq inspect` (`inspection`).
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
"""The tensors that store a weight: suffix → (dtype, shape)."""
Groups = Mapping[Scheme, Sequence[str]]
"""The names of the modules that have each scheme."""


@dataclass(frozen=True)
class Loader:
    """What is known of a tool that may read a folder, in a sentence.

    tried: whether it has loaded a folder of this kind, with right results. code: the tool whose example code the model
    card shows, or None. warn: whether the plan warns of it.
    """

    sentence: str
    tried: bool = True
    code: Literal["transformers", "vllm"] | None = None
    warn: bool = False


class Format(Protocol):
    """A format that llmq writes: a module with these functions.

    ONE_SCHEME: whether all weights of a folder have the same scheme.
    """

    ONE_SCHEME: bool

    def spec(self, shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
        """The tensors that store a weight [out, in]. Raises LlmqError if the group size does not divide the inputs."""

    def pack(self, q: Any) -> dict[str, Tensor]:
        """The tensors to store, by suffix, as `spec` says. q: the grid's own kind of Quantized.

        Raises LlmqError if a part of q is missing.
        """

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        """The inverse of `pack`. Raises LlmqError when tensors are missing or misshapen."""

    def splits(self, shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
        """Whether a server can split a weight [out, in] in equal parts along its outputs, or (row_parallel) inputs."""

    def config(self, groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint whose model computes in `dtype`.

        ignore: the names of linear modules left alone. Names as in the checkpoint, without '.weight'. Raises LlmqError
        if nothing is quantized, or the configuration cannot describe the folder.
        """

    def title(self, schemes: Collection[Scheme]) -> str:
        """The format's name for people."""

    def loaders(self, schemes: Collection[Scheme]) -> list[Loader]:
        """What stock transformers does with a folder of these schemes (`vllm` has the same of vLLM)."""


@dataclass(frozen=True)
class Row:
    """One weight of any folder. bits and group None: not quantized, stored in dtype; group 0: one scale per output
    channel.

    error: relative error from the folder's report, if there is one. nbytes: with scales and all other tensors of the
    weight. kind: 'int', 'float', 'nf4' …, or 'plain'.
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
        """The number of elements of the weight."""
        return math.prod(self.shape)


SMALL = 1 << 16
"""The largest tensor, in bytes, that an inspection may read."""


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 → 'float16'."""
    return str(dtype).removeprefix("torch.")
