"""Lists every weight of a model folder of any tool: its bits, group size, error and bytes.

Reads the headers of the safetensors files, the configuration and a few small tensors that give a shape; never a weight.
A quantized weight is stored as several tensors; each format says which suffixes belong together. Nothing is stated that
the tensors' own shapes and dtypes do not bear out: the rest is "not understood", with its bytes only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmq import formats
from llmq.checkpoint.files import REPORT
from llmq.checkpoint.source import FolderSource, Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.formats.base import UNKNOWN, Row, Unclear, dtype_name
from llmq.formats.served import unguarded
from llmq.grids.cache import Cache
from llmq.grids.table import GRIDS

OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files beside a config.json that says nothing of quantization → the method that they are of."""
PACKED = {
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
}
"""What codes are stored as; 64-bit integers and booleans are positions and masks."""
SCALING = ("scale", "zero", "absmax", "codebook", "scb", "quant")
"""Parts of the names of tensors that give codes their meaning."""
ORDINARY = (".weight", ".bias")
FEWEST = 3
"""Modules of a numbered list that are told of as one."""


@dataclass(frozen=True)
class Inspection:
    """Every weight of a folder, in the order of its names. method: the quantization method in config.json, or None;
    cache: how keys and values are rounded, if the folder has scales for that."""

    folder: Path
    method: str | None
    format: str | None
    rows: tuple[Row, ...]
    cache: Cache | None = None

    @property
    def lines(self) -> tuple[Row | Alike, ...]:
        """The rows, with what belongs to the experts of a block as one."""
        return tuple(_lines(self.rows))

    @property
    def size(self) -> int:
        """The number of elements of all weights that are understood."""
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
    def unknown(self) -> tuple[Row, ...]:
        """The weights whose layout is not understood: only their bytes are known."""
        return tuple(row for row in self.rows if not row.understood)

    @property
    def bits_per_weight(self) -> float | None:
        """Effective bits per weight of the whole model, including scales, zero points and unquantized weights.

        None if some weights are not understood.
        """
        return None if self.unknown else 8 * self.nbytes / max(1, self.size)

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """The same over the quantized weights alone that are understood; None if there are none."""
        rows = self.quantized
        return 8 * sum(row.nbytes for row in rows) / max(1, sum(row.size for row in rows)) if rows else None


@dataclass(frozen=True)
class Alike:
    """The weights of modules in a numbered list inside a block, such as its experts. name: of the list."""

    name: str
    count: int
    rows: tuple[Row, ...]


def _lines(rows: Sequence[Row]) -> Iterator[Row | Alike]:
    """The rows, but in the place of the first of a list of modules, all of them as one.

    Names say nothing. A list counts if it is within another numbered list (of the blocks), its modules are numbered
    from 0, are FEWEST or more, have a weight of one name, and no modules inside modules, as a block has.
    """
    lists: dict[str, dict[int, list[tuple[str, Row]]]] = {}
    deep: set[str] = set()
    places: list[str] = []
    for row in rows:
        parts = row.name.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
        deep |= {".".join(parts[:at]) for at in numbers if at + 3 < len(parts)}
        last = numbers[-1] if len(numbers) > 1 and numbers[-1] + 1 < len(parts) else 0
        places.append(".".join(parts[:last]))
        if last:
            lists.setdefault(places[-1], {}).setdefault(int(parts[last]), []).append((".".join(parts[last + 1 :]), row))
    whole = {
        name
        for name, modules in lists.items()
        if len(modules) >= FEWEST and set(modules) == {*range(len(modules))} and name not in deep
        if set.intersection(*({inside for inside, _ in found} for found in modules.values()))
    }
    told: set[str] = set()
    for row, place in zip(rows, places, strict=True):
        if place not in whole:
            yield row
        elif place not in told:
            told.add(place)
            mine = (row for found in lists[place].values() for _, row in found)
            yield Alike(place, len(lists[place]), tuple(mine))


def inspect_folder(path: Path) -> Inspection:
    """Inspect a model folder: compressed-tensors, gptq, awq, bitsandbytes, fp8, fp4, mlx, or unquantized.

    What is in another layout, or contradicts its configuration, is a row that is not understood: it has its bytes only.
    Raises LlmqError if it is not a model folder, or its files are missing or damaged.
    """
    source = FolderSource(Path(path), trust_remote_code=True, quantized_ok=True)
    method, config = section_of(source.folder, source.config)
    reported = _reported(source.folder)
    rows = [_completed(row, reported) for row in _rows(source, method, config)]
    rows.sort(key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row.name)])
    return Inspection(source.folder, method, config.get("format"), tuple(rows), formats.read_cache(method, config))


def section_of(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The quantization method of a folder, None if it names none, and its settings, wherever its tool puts them."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key)
            if isinstance(found, Mapping) and found:
                return formats.method_of(found) or ("mlx" if "quantization" in part else None), unguarded(found)
    for name, method in OLD_FILES.items():
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, Mapping):
            inner = found.get("quantization")
            return method, inner if isinstance(inner, Mapping) else found
    return None, {}


def _rows(source: Source, method: str | None, config: Mapping[str, Any]) -> Iterator[Row]:
    names = set(source.names())
    taken: set[str] = set()
    understood = False
    for name in sorted(names):
        for known, stem, parts in _weights(source, name, names):
            taken |= {info.name for info in parts.values()}
            try:
                row = known.inspect(source, stem, parts, method, config)
                understood = understood or row.bits is not None
            except Unclear as unclear:
                row = _unknown(f"{stem}.weight", list(parts.values()), str(unclear))
            yield row
            break
    left: dict[str, list[TensorInfo]] = {}
    for name in sorted(names - taken):
        left.setdefault(_module(name, names), []).append(source.info(name))
    for module, found in left.items():
        if strange := _strange(found, method, understood):
            yield _unknown(module if len(found) > 1 else found[0].name, found, strange)
        else:
            for info in found:
                yield Row(info.name, info.shape, "plain", None, None, None, None, info.nbytes, dtype_name(info.dtype))


def _weights(source: Source, name: str, names: set[str]) -> Iterator[tuple[Any, str, dict[str, TensorInfo]]]:
    """The formats to which a tensor may be the codes of a weight; the weight's name, and its tensors by suffix."""
    for known in formats.having("COMPANIONS"):
        for ending, companions in known.COMPANIONS.items():
            dot = "" if ending.startswith("_") else "."
            stem = name.removesuffix(dot + ending)
            if stem == name:
                continue
            there = (part for part in (ending, *companions) if f"{stem}{dot}{part}" in names)
            parts = {part: source.info(f"{stem}{dot}{part}") for part in there}
            if any(scale in parts for scale in known.SCALES):
                yield known, stem, parts


def _module(name: str, names: set[str]) -> str:
    """The module of a tensor; that of the weight for a tensor named after one (`up.weight.absmax`)."""
    above = name.rpartition(".")[0]
    return above.rpartition(".")[0] if above in names else above or name


def _strange(found: list[TensorInfo], method: str | None, understood: bool) -> str:
    """Why a module's tensors, which no format knows, are not plain numbers; '' if they are.

    understood: whether other weights of the folder are in a format that is known.
    """
    words = [info for info in found if info.dtype in PACKED]
    beside = [info.name for info in found if any(word in info.name.rpartition(".")[2].lower() for word in SCALING)]
    eight = [info for info in words if info.dtype.is_floating_point]
    if (words and (method or beside)) or eight:
        one = (eight or words)[0]
        told = f"with {', '.join(name.rpartition('.')[2] for name in beside)}" if beside else "without scales"
        return f"{one.name.rpartition('.')[2]} is {dtype_name(one.dtype)} {[*one.shape]} {told}"
    others = [info for info in found if len(info.shape) > 1 and not info.name.endswith(ORDINARY)]
    if method and not understood and others:
        return f"{others[0].name.rpartition('.')[2]} is {dtype_name(others[0].dtype)} {[*others[0].shape]}"
    return ""


def _unknown(name: str, found: list[TensorInfo], why: str) -> Row:
    return Row(name, (), UNKNOWN, None, None, None, None, sum(info.nbytes for info in found), "", why)


def _reported(folder: Path) -> dict[str, tuple[float, str]]:
    """Weight name → relative error and grid, from llmq's report; empty if there is none."""
    try:
        rows = json.loads((folder / REPORT).read_text(encoding="utf-8"))["weights"]
        known = [row for row in rows if row.get("error") is not None]
        return {row["name"]: (float(row["error"]), str((row.get("scheme") or {}).get("grid"))) for row in known}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _completed(row: Row, reported: Mapping[str, tuple[float, str]]) -> Row:
    """The row with what the report says of it, as far as its own bits bear that out."""
    found = reported.get(row.name) or reported.get(row.name.removesuffix(".weight"))
    if row.bits is None or found is None:
        return row
    rules = GRIDS.get(found[1])
    if rules is None or rules.information_bits is None or (row.kind, row.bits) != (rules.read_as, rules.bits[0]):
        return replace(row, error=found[0])
    return replace(row, error=found[0], holds=f"{rules.label}, {rules.information_bits:.3g} bits of information")
