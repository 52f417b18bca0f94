"""The interface of a checkpoint format; each format has one file or folder with all code for it.

A format that llmq writes has the functions of `Format`; the grids that it stores name it (`grids.table`). All other
parts are optional:

- READERS: method in config.json → the reader of its weights for llmq's kernels (`plain.Reader`), whether or not
  transformers supports the method;
- runs_packed(section): whether READERS run a folder of this configuration, where it could also be dequantized; without
  it, they run all;
- PACKAGES: method in config.json → the package that stock transformers needs to read it;
- STOCK_UNPACKS: whether stock transformers makes the weights of PACKAGES dense to run them;
- loads_dense(schemes), dense(section): whether a folder can say that stock transformers is to unpack all weights while
  it loads them, not at the first forward of the whole model; and the configuration that says so;
- with_targets(section, names, classes): the configuration with modules as targets by name, which not every loader
  counts as linear; without classes, those modules alone;
- REPLACES_MODULES: whether stock transformers puts modules of another class, with a `weight` that a model's
  initialization may read, in the place of those with packed weights;
- OWN: whether only llmq reads the format;
- loaded_bytes(shape, scheme, dtype): the bytes of a weight on llmq's kernels, where they are not those of integers;
- refuse_experts(scheme): why stock transformers, or llmq for an OWN format, could not load a mixture's experts of a
  scheme, or None; without it there are none that are loaded;
- claims(section): whether a configuration without `quant_method` is of this format;
- COMPANIONS, SCALES, inspect: descriptions of weights, for `llmq inspect` (`inspection`). A key of COMPANIONS that
  begins with '_' ends a tensor's name without a dot. What `inspect` cannot be sure of, it raises as Unclear;
- dequantizes(method, section), coded(source, section, dtype): whether a folder to quantize is of this format, and its
  weights, which are dequantized when they are read (`dequantized`); read_by_stock(method, section): whether such a
  folder is all the same left to stock transformers when the model is run; without it, it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
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
    code: Literal["transformers", "vllm", "llmq"] | None = None
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
    weight. kind: 'int', 'float', 'nf4' …, 'plain', or UNKNOWN, of which only nbytes is known; why: the reason for that.
    holds: what the folder's report says that the codes are, if that is less than their bits hold.
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
    why: str = ""
    holds: str = ""

    @property
    def understood(self) -> bool:
        """Whether more than its stored bytes is known."""
        return self.kind != UNKNOWN

    @property
    def size(self) -> int:
        """The number of elements of the weight; 0 if that is not known."""
        return math.prod(self.shape) if self.understood else 0


UNKNOWN = "unknown"


class Unclear(Exception):
    """A weight's tensors have no layout that is known, or contradict config.json: what was found, in a few words."""


SMALL = 1 << 16
"""The largest tensor, in bytes, that an inspection may read."""


def whole(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these values that is a whole number, also written as text; None if there is none."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, str) and value.lstrip("-").isdigit():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def inputs_per_scale(inputs: int, scales: int, stated: int | None) -> int:
    """The group size of a row of `inputs` weights that has this many scales; 0 for one scale.

    stated: by the configuration: -1 for one scale, None if it does not say. Raises Unclear if that is not so, or if
    there are several sizes that it could be.
    """
    if stated and scales != (-(-inputs // stated) if stated > 0 else 1):
        told = f"groups of {stated}" if stated > 0 else "one for each row"
        raise Unclear(f"{scales} scales for {inputs} inputs, but config.json says {told}")
    if scales <= 1:
        return 0
    if stated:
        return stated
    powers = (1 << k for k in range(inputs.bit_length()))
    fitting = {size for size in powers if -(-inputs // size) == scales}
    fitting |= set() if inputs % scales else {inputs // scales}
    if len(fitting) != 1:
        raise Unclear(f"{scales} scales for {inputs} inputs, and config.json does not say how large a group is")
    return fitting.pop()


def check_named(
    inputs: int, bits: int, config: Mapping[str, Any], beside: Sequence[int] = (), others: Iterable[int] = range(2, 9)
) -> None:
    """Check a number of inputs that follows from `bits` alone, by the sizes in the model's own config.json.

    beside: the outputs of the other weights of the same parent module (`outputs_beside`), which no width of codes
    changes: where two of them agree (gate and up), the weight after them takes as many. others: the widths of codes
    that the tensors could have as well. Raises Unclear if no size is that number, nor the product of two, but another
    width would give one, or if all the weights beside it have as many outputs as another width would give inputs.
    """
    counts = Counter(beside)
    if counts[inputs] > 1:
        return
    sizes = set(_numbers(config))
    products = {frozenset((size, inputs // size)) for size in sizes if inputs % size == 0 and inputs // size in sizes}
    for other in others:
        right = inputs * bits // other
        if other == bits or right * other != inputs * bits:
            continue
        if len(counts) == 1 and counts[right] > 1:
            raise Unclear(f"{bits} bits would make {inputs} inputs, {other} bits {right} as the weights beside it give")
        if inputs not in sizes and right in sizes:
            # Twice the right size is a product too, where a model has two of something.
            if any(right not in pair for pair in products):
                continue
            raise Unclear(f"{bits} bits would make {inputs} inputs, {other} bits {right} as the model has")


def outputs_beside(source: Source, module: str, axes: Mapping[str, int]) -> list[int]:
    """The outputs of the other weights of the same parent module; none if all have as many as this one: they may be
    parallel to it (query, key and value) and say nothing of its inputs. axes: a tensor's last name → its outputs' axis.
    """
    weights: dict[str, int] = {}
    for name in _children(source).get(module.rpartition(".")[0], ()):  # type: ignore[arg-type]
        other, _, last = name.rpartition(".")
        shape = source.info(name).shape
        if last in axes and len(shape) > 1:
            weights.setdefault(other, shape[axes[last]])
    own = weights.pop(module, None)
    return [] if set(weights.values()) == {own} else list(weights.values())


@lru_cache(maxsize=1)
def _children(source: Source) -> dict[str, list[str]]:
    """Parent of a module → the tensors of all its modules."""
    found: dict[str, list[str]] = {}
    for name in source.names():
        found.setdefault(".".join(name.split(".")[:-2]), []).append(name)
    return found


def _numbers(config: Mapping[str, Any]) -> Iterator[int]:
    """The positive whole numbers of a model's configuration, but for its quantization."""
    for key, value in config.items():
        if isinstance(value, Mapping) and "quantization" not in key and "compression" not in key:
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield value


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 → 'float16'."""
    return str(dtype).removeprefix("torch.")
