"""What is in a model folder: every weight, its bits, group, error and bytes, whichever tool wrote it.

Reads the headers of the safetensors files, the configuration and a few tensors of some bytes that state a shape; never
a weight. A quantized weight is several tensors: each layout below says which endings belong together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmq.checkpoint.files import REPORT
from llmq.checkpoint.source import FolderSource, Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError

# Endings that, beside a tensor that holds the codes, belong to the same weight.
_COMPANIONS = {
    "weight_packed": (
        "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
        "input_scale", "input_zero_point", "input_global_scale",
    ),
    "qweight": ("qzeros", "scales", "g_idx"),
    "weight": (
        "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_shape",
        "input_scale", "input_zero_point", "SCB", "weight_format", "weight.absmax", "weight.quant_map",
        "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
        "weight.quant_state.bitsandbytes__fp4",
    ),
}  # fmt: skip
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "SCB", "weight.absmax")
_SMALL = 1 << 16  # bytes of a tensor that may be read


@dataclass(frozen=True)
class Row:
    """One weight. bits and group None: stored as it is, in dtype; group 0: one scale per output channel.

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


@dataclass(frozen=True)
class Inspection:
    """Every weight of a folder, in the order of its names. method: what config.json says quantized it, or None."""

    folder: Path
    method: str | None
    format: str | None
    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """Numbers in all weights."""
        return sum(row.size for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all weights."""
        return sum(row.nbytes for row in self.rows)

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The weights that are quantized."""
        return tuple(row for row in self.rows if row.bits is not None)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits per weight of the whole model: scales, zero points and what was left alone counted."""
        return 8 * self.nbytes / max(1, self.size)

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """The same over the quantized weights alone; None if there are none."""
        rows = self.quantized
        return 8 * sum(row.nbytes for row in rows) / max(1, sum(row.size for row in rows)) if rows else None


def inspect_folder(path: Path) -> Inspection:
    """Look at a model folder: compressed-tensors, gptq, awq, bitsandbytes, fp8, or not quantized at all.

    Raises LlmqError if it is no model folder, or its files are missing or damaged.
    """
    source = FolderSource(Path(path), trust_remote_code=True, quantized_ok=True)
    found = source.config.get("quantization_config") or source.config.get("compression_config") or {}
    config: dict[str, Any] = found if isinstance(found, dict) else {}
    method = config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else None)
    errors = _errors(source.folder)
    rows = [replace(row, error=_error(row, errors)) for row in _rows(source, method, config)]
    rows.sort(key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row.name)])
    return Inspection(source.folder, method, config.get("format"), tuple(rows))


def _rows(source: Source, method: str | None, config: Mapping[str, Any]) -> Iterator[Row]:
    names = set(source.names())
    taken: set[str] = set()
    for name in sorted(names):
        module, _, ending = name.rpartition(".")
        if ending not in _COMPANIONS:
            continue
        parts = {ending: source.info(name)}
        for companion in _COMPANIONS[ending]:
            if f"{module}.{companion}" in names:
                parts[companion] = source.info(f"{module}.{companion}")
        if not any(scale in parts for scale in _SCALES):
            continue
        taken |= {info.name for info in parts.values()}
        yield _quantized(source, module, parts, method, config)
    for name in names - taken:
        info = source.info(name)
        yield Row(name, info.shape, "plain", None, None, None, None, info.nbytes, _dtype(info))


def _quantized(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    nbytes = sum(part.nbytes for part in parts.values())
    name = f"{module}.weight"
    if "qweight" in parts:
        return _packed_columns(name, parts, nbytes, method, config)
    if "weight.absmax" in parts or "SCB" in parts:
        return _bitsandbytes(source, name, parts, nbytes)
    codes = parts.get("weight_packed") or parts["weight"]
    scale = parts.get("weight_scale") or parts["weight_scale_inv"]
    scheme = _scheme(module, config)
    kind = str(scheme.get("type") or ("float" if codes.dtype.is_floating_point else "int"))
    bits = int(scheme.get("num_bits") or (4 if codes is parts.get("weight_packed") else 8 * codes.dtype.itemsize))
    shape = codes.shape
    if codes is parts.get("weight_packed"):
        per_code = codes.dtype.itemsize * 8
        shape = (*codes.shape[:-1], codes.shape[-1] * per_code // bits)
        if "weight_shape" in parts and parts["weight_shape"].nbytes < _SMALL:
            shape = tuple(int(size) for size in source.read(parts["weight_shape"].name).tolist())
    group = _group(shape, scale.shape, scheme)
    # Floating point grids have no zero point; where the scheme says nothing, a stored zero point tells.
    symmetric = bool(scheme.get("symmetric", "weight_zero_point" not in parts)) if kind == "int" else True
    return Row(name, shape, kind, bits, group, symmetric, None, nbytes, _dtype(codes))


def _group(shape: tuple[int, ...], scales: tuple[int, ...], scheme: Mapping[str, Any]) -> int:
    """Inputs that share a scale; 0 for one scale per channel or for the whole weight."""
    stated = scheme.get("group_size")
    if isinstance(stated, int) and stated > 0:
        return stated
    if len(scales) != len(shape) or scales[-1] <= 1:
        return 0
    return math.ceil(shape[-1] / scales[-1])


def _packed_columns(
    name: str, parts: Mapping[str, TensorInfo], nbytes: int, method: str | None, config: Mapping[str, Any]
) -> Row:
    """GPTQ packs along the inputs, AWQ along the outputs; scales are [groups, out] in both."""
    qweight, scales = parts["qweight"], parts["scales"]
    bits = int(config.get("bits") or config.get("w_bit") or 4)
    per_word = qweight.dtype.itemsize * 8
    out = scales.shape[-1]
    inputs = qweight.shape[0] if qweight.shape[-1] != out else qweight.shape[0] * per_word // bits
    group = math.ceil(inputs / scales.shape[0]) if scales.shape[0] > 1 else 0
    stated = config.get("sym", not config["zero_point"] if "zero_point" in config else method != "awq")
    return Row(name, (out, inputs), "int", bits, group, bool(stated), None, nbytes, _dtype(qweight))


def _bitsandbytes(source: Source, name: str, parts: Mapping[str, TensorInfo], nbytes: int) -> Row:
    weight = parts["weight"]
    if "SCB" in parts:
        return Row(name, weight.shape, "int", 8, 0, True, None, nbytes, _dtype(weight))
    for ending, part in parts.items():
        if "quant_state" in ending and part.nbytes < _SMALL:
            try:
                state = json.loads(bytes(source.read(part.name).tolist()))
                shape = tuple(int(size) for size in state["shape"])
                kind, group = str(state["quant_type"]), int(state["blocksize"])
            except (ValueError, KeyError, TypeError) as error:
                raise LlmqError(f"{part.file}: {part.name} is damaged ({error}); download it again") from error
            return Row(name, shape, kind, 4, group, True, None, nbytes, _dtype(weight))
    size = 2 * math.prod(weight.shape)
    return Row(name, (size,), "nf4", 4, size // parts["weight.absmax"].shape[0], True, None, nbytes, _dtype(weight))


def _scheme(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` entry of the config group that a module belongs to: by name or pattern, else the class-wide one."""
    groups = config.get("config_groups")
    wide: Mapping[str, Any] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            continue
        for target in group.get("targets") or ():
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return group["weights"]  # type: ignore[no-any-return]
            if pattern == target and "." not in target:
                wide = wide or group["weights"]
    return wide


def _errors(folder: Path) -> dict[str, float]:
    """Weight name → relative error, from the report that llmq writes; empty where there is none."""
    try:
        rows = json.loads((folder / REPORT).read_text(encoding="utf-8"))["weights"]
        return {row["name"]: float(row["error"]) for row in rows if row.get("error") is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _error(row: Row, errors: Mapping[str, float]) -> float | None:
    if row.bits is None:
        return None
    return errors.get(row.name, errors.get(row.name.removesuffix(".weight")))


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
