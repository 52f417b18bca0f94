"""Lists every weight of a model folder of any tool: its bits, group size, error and bytes.

Reads the headers of the safetensors files, the configuration and a few small tensors that give a shape; never a weight.
A quantized weight is stored as several tensors; each format says which suffixes belong together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.checkpoint.files import REPORT
from llmq.checkpoint.source import FolderSource, Source
from llmq.formats.base import Row, dtype_name


@dataclass(frozen=True)
class Inspection:
    """Every weight of a folder, in the order of its names. method: the quantization method in config.json, or None."""

    folder: Path
    method: str | None
    format: str | None
    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """The number of elements of all weights."""
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
        """Effective bits per weight of the whole model, including scales, zero points and unquantized weights."""
        return 8 * self.nbytes / max(1, self.size)

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """The same over the quantized weights alone; None if there are none."""
        rows = self.quantized
        return 8 * sum(row.nbytes for row in rows) / max(1, sum(row.size for row in rows)) if rows else None


def inspect_folder(path: Path) -> Inspection:
    """Inspect a model folder: compressed-tensors, gptq, awq, bitsandbytes, fp8, or unquantized.

    Raises LlmqError if it is not a model folder, or its files are missing or damaged.
    """
    source = FolderSource(Path(path), trust_remote_code=True, quantized_ok=True)
    found = source.config.get("quantization_config") or source.config.get("compression_config") or {}
    config: dict[str, Any] = found if isinstance(found, dict) else {}
    method = formats.method_of(config)
    errors = _errors(source.folder)
    rows = [replace(row, error=_error(row, errors)) for row in _rows(source, method, config)]
    rows.sort(key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row.name)])
    return Inspection(source.folder, method, config.get("format"), tuple(rows))


def _rows(source: Source, method: str | None, config: Mapping[str, Any]) -> Iterator[Row]:
    names = set(source.names())
    taken: set[str] = set()
    for name in sorted(names):
        module, _, ending = name.rpartition(".")
        for known in (known for known in formats.having("COMPANIONS") if ending in known.COMPANIONS):
            parts = {ending: source.info(name)}
            for companion in known.COMPANIONS[ending]:
                if f"{module}.{companion}" in names:
                    parts[companion] = source.info(f"{module}.{companion}")
            if any(scale in parts for scale in known.SCALES):
                taken |= {info.name for info in parts.values()}
                yield known.inspect(source, module, parts, method, config)
                break
    for name in names - taken:
        info = source.info(name)
        yield Row(name, info.shape, "plain", None, None, None, None, info.nbytes, dtype_name(info.dtype))


def _errors(folder: Path) -> dict[str, float]:
    """Weight name → relative error, from llmq's report; empty if there is none."""
    try:
        rows = json.loads((folder / REPORT).read_text(encoding="utf-8"))["weights"]
        return {row["name"]: float(row["error"]) for row in rows if row.get("error") is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _error(row: Row, errors: Mapping[str, float]) -> float | None:
    if row.bits is None:
        return None
    return errors.get(row.name, errors.get(row.name.removesuffix(".weight")))
