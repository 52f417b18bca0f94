"""A folder whose weights are published in few bits, read as the dense model that they stand for.

A format that reads such folders has `dequantizes(method, section)`, which judges by config.json, and `coded(source,
section, dtype)`, the weights that are dequantized. There is never a dense copy: each weight is dequantized when it is
read, an expert's entry of a stack alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.checkpoint.source import FolderSource, Source, Wrapped, check_finite
from llmq.checkpoint.store import LOCAL, Store
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.inspection import section_of

SECTIONS = ("quantization_config", "compression_config", "quantization")
DENSE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHED = ("k_scale", "v_scale")
CHUNK = 1 << 22
"""The most numbers that are dequantized at a time, so that a float32 copy of a whole weight is never made."""


@dataclass(frozen=True)
class Coded:
    """A weight that is stored as codes and scales.

    name, shape: as it is read; parts: the tensors that store it, the codes first; rows: its rows start…stop−1; dropped:
    tensors beside it that only say how its inputs or outputs are rounded.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    rows: Callable[[int, int], Tensor]
    dropped: tuple[str, ...] = ()


class Dequantized(Wrapped):
    """`base` with its coded weights dequantized when read.

    A weight has the dtype `dtype`, everything else is the base's; scales are no tensors of their own. method: how the
    weights are quantized, for people. Reading raises LlmqError if a scale, or what comes of it, is not finite.
    """

    def __init__(self, base: Source, method: str, coded: list[Coded], dtype: torch.dtype) -> None:
        super().__init__(base)
        self.dtype = dtype
        self.config = unquantized(base.config)
        self.coded = {weight.name: weight for weight in coded}
        codes = {weight.parts[0]: weight.name for weight in coded}
        dropped = list(dict.fromkeys([*(name for weight in coded for name in weight.dropped), *cache_scales(base)]))
        hidden = {name for weight in coded for name in weight.parts[1:]} | set(dropped)
        # A weight stands where its codes do.
        self._names = [codes.get(name, name) for name in base.names() if name not in hidden]
        self._hidden = (hidden | set(codes)) - set(self.coded)
        kind = str(dtype).removeprefix("torch.")
        self.warnings += (
            f"the source is quantized ({method}): {len(coded)} of its weights are dequantized to {kind} while they are "
            "read; errors are against these values, and what is not quantized again is written in this dtype",
        )
        if dropped:
            self.warnings += (
                f"{', '.join(dropped[:3])}{' …' if len(dropped) > 3 else ''} say how the source's activations are "
                "rounded: they are left out of what is written",
            )

    def names(self) -> list[str]:
        """See `Source.names`: the weights, without scales and other tensors of quantization."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`: dtype and shape of the dequantized weight, and the file of its codes."""
        weight = self.coded.get(name)
        if name in self._hidden:
            raise KeyError(name)
        if weight is None:
            return self.base.info(name)
        file = self.base.info(weight.parts[0]).file
        return TensorInfo(name, self.dtype, weight.shape, file, 0, prod(weight.shape) * self.dtype.itemsize)

    def changes_tensor(self, name: str) -> bool:
        """See `Wrapped.changes_tensor`."""
        return name in self.coded

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized if it is stored as codes."""
        return self.read_rows(name, 0, self.coded[name].shape[0]) if name in self.coded else self.base.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Source.read_rows`: only the codes and scales of these rows are read."""
        weight = self.coded.get(name)
        if weight is None:
            return self.base.read_rows(name, start, stop)
        if not 0 <= start <= stop <= weight.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name}, whose shape is {[*weight.shape]}")
        value = weight.rows(start, stop)
        check_finite(value, name, self.info(name).file)
        return value

    def fingerprint(self) -> str:
        """A hash of the base, and of how it is read."""
        parts = ["dequantized", str(self.dtype), self.base.fingerprint()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_source(folder: Path, trust_remote_code: bool = False, store: Store = LOCAL) -> Source:
    """A model folder to quantize; one in a format that is dequantized on read is a `Dequantized`.

    store: where its weights are.

    Raises LlmqError as FolderSource does, also for a model that is quantized in any other way; and if a weight's codes,
    scales and configuration contradict each other.
    """
    base = FolderSource(folder, trust_remote_code, quantized_ok=partial(reads, folder), store=store)
    method, section = section_of(folder, base.config)
    known = _format(method, section)
    if known is None:
        return base
    dtype = dtype_of(base.config)
    return Dequantized(base, str(method), known.coded(base, section, dtype), dtype)


def reads(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `open_source` dequantizes a folder with this config.json."""
    return _format(*section_of(folder, config)) is not None


def _format(method: str | None, section: Mapping[str, Any]) -> Any:
    """The format that dequantizes folders of a method, or None."""
    return next((known for known in formats.having("dequantizes") if known.dequantizes(method, section)), None)


def cache_scales(source: Source) -> list[str]:
    """The scales of the keys and values of a folder whose config.json says that they are rounded."""
    parts = (source.config, *(value for value in source.config.values() if isinstance(value, Mapping)))
    sections = [part.get(name) for part in parts for name in SECTIONS]
    if not any(isinstance(section, Mapping) and section.get("kv_cache_scheme") for section in sections):
        return []
    return [name for name in source.names() if name.rpartition(".")[2] in CACHED]


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its quantization section, which may be that of a model inside it."""
    kept = {key: value for key, value in config.items() if key not in SECTIONS}
    return {key: unquantized(value) if isinstance(value, dict) else value for key, value in kept.items()}


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config.json names for the model, or for one inside it; bfloat16 if it names none."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in DENSE:
                return DENSE[part[key]]
    return torch.bfloat16


def pieces(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start…stop−1 of a weight in pieces [begin, end) of at most CHUNK numbers, or of one row."""
    step = max(1, CHUNK // max(1, prod(shape[1:])))
    for begin in range(start, stop, step):
        yield begin, min(stop, begin + step)


def damaged(source: Source, name: str, problem: str) -> LlmqError:
    """An error for a quantized weight whose tensors do not fit: it names the file, the tensor and the way out."""
    return LlmqError(
        f"{source.info(name).file}: {name} {problem}: download the folder again with its own config.json, or start "
        "from the unquantized model"
    )
