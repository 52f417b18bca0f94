"""Folders of integers, and of 6-bit floats, read as the dense model that they stand for: for `llmq export --to dense`.

`formats.fp8` reads those of other floats. The tensors decide; config.json must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
from llmq.errors import LlmqError
from llmq.formats import fp8
from llmq.formats.base import whole
from llmq.formats.compressed_tensors import microscaled
from llmq.formats.compressed_tensors.eight_bit import INPUT_SCALE, WEIGHT
from llmq.formats.compressed_tensors.packed import PACKED, SCALE, SHAPE, ZERO
from llmq.formats.compressed_tensors.read import GROUPS, PackedLayer
from llmq.formats.dequantized import Coded, damaged
from llmq.formats.packing import packed_width
from llmq.grids.scheme import Scheme
from llmq_kernels.int_linear import dense_bits
from llmq_kernels.weights import PackedInt

SIX = Scheme(6, 32, grid="mxfp6")
PARTS = (PACKED, WEIGHT, SCALE, SHAPE, ZERO, GROUPS)


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored as codes. Raises LlmqError if its tensors do not fit each other, or config.json."""
    names, groups = set(source.names()), section.get("config_groups")
    listed = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    forms = {str(group.get("format") or section.get("format")) for group in listed}
    widths = {whole(group.get("weights") or {}, "num_bits") for group in listed}
    found = []
    for name in source.names():
        stem, _, suffix = name.rpartition(".")
        kind = source.info(name).dtype
        if (suffix, kind) in ((PACKED, torch.int32), (WEIGHT, torch.int8)):
            found.append(_integers(source, stem, suffix, names, widths, dtype))
        elif suffix == PACKED and kind == torch.uint8 and SIX.rules.layout in forms:
            found.append(_six(source, stem, dtype))
    floats = forms - {SIX.rules.layout, "pack-quantized", "int-quantized", "naive-quantized"}
    if not floats:
        return found
    if SIX.rules.layout in forms:
        raise LlmqError(f"{source.folder}: {SIX.rules.layout} beside {', '.join(sorted(floats))} is not exported")
    return [*found, *fp8.coded(source, section, dtype)]


def _integers(
    source: Source, stem: str, suffix: str, names: set[str], widths: set[int | None], dtype: torch.dtype
) -> Coded:
    first = f"{stem}.{suffix}"
    stored = {part: f"{stem}.{part}" for part in PARTS if f"{stem}.{part}" in names}
    infos = {part: source.info(name) for part, name in stored.items()}
    missing = [part for part in (SCALE, *((SHAPE,) if suffix == PACKED else ())) if part not in stored]
    if missing:
        raise damaged(source, first, f"is stored as codes, and {', '.join(missing)} is missing")
    rows, width = infos[suffix].shape
    bits: int | None = 8
    if suffix == PACKED:
        rows, width = (int(n) for n in source.read(stored[SHAPE]).tolist())
        words = infos[PACKED].shape[-1]
        bits = next((b for b in sorted(w for w in widths if w) if packed_width(width, b) == words), None)
    scales = infos[SCALE].shape
    groups = scales[1] if len(scales) == 2 else 1
    if bits is None or groups < 1 or width % groups or scales not in ((rows, groups), (1, 1), (1,), ()):
        told = ", ".join(f"{part} {[*info.shape]}" for part, info in infos.items())
        raise damaged(source, first, f"does not fit: {told} for [{rows}, {width}] and what config.json says")
    layer = PackedLayer(
        (rows, width), bits, width // groups, ZERO not in stored, suffix == PACKED, GROUPS in stored, scales
    )
    for part, entry in layer.entries.items():
        info = infos[part]
        if info.dtype not in entry.dtypes or tuple(info.shape) != tuple(entry.shape):
            raise damaged(source, first, f"does not fit: {part} must be {entry}, not {info.dtype} {[*info.shape]}")
    parts = (first, *(name for part, name in stored.items() if part != suffix))
    dropped = (f"{stem}.{INPUT_SCALE}",) if f"{stem}.{INPUT_SCALE}" in names else ()
    return Coded(f"{stem}.weight", (rows, width), parts, partial(_int_rows, source, layer, stored, dtype), dropped)


def _int_rows(
    source: Source, layer: PackedLayer, stored: Mapping[str, str], dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """Some rows of a weight, of which all codes are read."""
    weight = layer.read({part: source.read(name) for part, name in stored.items()})
    held = PackedInt(weight.words, weight.scale, weight.zero, weight.bits, *layer.shape, weight.group_size)
    value = dense_bits.dequantize(held, dtype)
    if weight.order is not None:
        value = value.index_select(1, torch.argsort(weight.order))
    return value[start:stop]


def _six(source: Source, stem: str, dtype: torch.dtype) -> Coded:
    parts = (f"{stem}.{PACKED}", f"{stem}.{SCALE}")
    rows, nbytes = source.info(parts[0]).shape

    def some(start: int, stop: int) -> Tensor:
        tensors = {PACKED: source.read_rows(parts[0], start, stop), SCALE: source.read_rows(parts[1], start, stop)}
        return microscaled.unpack(tensors, SIX).dequantize(dtype)

    return Coded(f"{stem}.weight", (rows, nbytes * 8 // SIX.bits), parts, some)
