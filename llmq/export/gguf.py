"""`--to gguf`: llama.cpp's own converter names and arranges tensors, and the blocks are made of the folder's codes.

Nothing here knows an architecture. The converter runs on the dequantized weights, in the model's dtype; it permutes,
joins, splits and renames them as its program wants. Every row of what it writes is then looked up, bit for bit, among
the rows that it was given (`rows`). A tensor all of whose rows are found is written as blocks of their codes and
scales, in the smallest type that holds them all; everything else stays as the converter wrote it. One tensor is in
memory at a time: rows are looked up in a first pass over the converted file, and blocks written in a second.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmq.checkpoint.files import INDEX, put
from llmq.checkpoint.tensors import encode as encode_tensors
from llmq.errors import LlmqError
from llmq.export import converter
from llmq.export.folder import QuantizedFolder
from llmq.export.rows import Found, Numbers, RowIndex
from llmq.formats.gguf import blocks, file
from llmq.formats.gguf.blocks import Span
from llmq.formats.gguf.file import Contents, Held, New
from llmq.formats.gguf.types import TYPES
from llmq.validate import check_choice

CHUNK = 1 << 26
"""Bytes of a tensor that are read at a time."""
SHARD = 1 << 28
ENDS = ("token_embd.weight", "output.weight")
"""GGUF's names of the input and the output embedding."""
EMBEDDINGS = ("keep", "q8_0")
FAR = 2.0**-7
"""The largest difference of a written number to the converter's, by the largest of the tensor: what the rounding of
that to bfloat16, of scales and of minima to float16 come to is below."""


CHANGED = "the converter leaves out, or computes with, {}: they are not quantized in the file"
SPLIT = (
    "the converter does not know the tokenizer: the file says that it splits text as {} does, as given or as the "
    "tokenizer's own file says; compare some tokens"
)


@dataclass(frozen=True)
class Row:
    """One tensor of the written file. bits: of the codes that it was made of, None if it is not quantized; worst: the
    largest difference to the dequantized weights, relative to their largest number; why: it is as it is, or ''."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    bits: int | None
    worst: float
    why: str = ""


@dataclass(frozen=True)
class Exported:
    """A written file."""

    path: Path
    nbytes: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Planned:
    """A tensor to write. old: as the converter wrote it; found: where its rows come from, None if it is not quantized;
    factor: a number that the whole tensor is multiplied by, in a tensor of its own."""

    old: Held
    new: New
    found: Found | None = None
    factor: float | None = None
    why: str = ""


def export_gguf(
    path: Path,
    out: Path,
    *,
    llama_cpp: Path | None = None,
    embedding: str = "keep",
    prefer: str | None = None,
    pre_tokenizer: str | None = None,
    work: Path | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a quantized folder as one GGUF file.

    llama_cpp: the folder with llama.cpp's converter; embedding: 'keep' (in the model's dtype) or 'q8_0' (rounded to
    nearest, as llama.cpp does); prefer: a type that is taken wherever it holds the codes; pre_tokenizer: how the
    tokenizer splits text, if the converter does not know it; work: where temporary files go, twice the size of the
    unquantized model.

    Raises LlmqError if the folder cannot be exported, the converter is missing or fails, or the disk is full; then
    nothing is left behind.
    """
    if prefer is not None and prefer.upper() not in blocks.ORDER:
        raise LlmqError(f"--prefer {prefer}: choose from {', '.join(name.lower() for name in blocks.ORDER)}")
    check_choice("--embedding", embedding, EMBEDDINGS)
    if out.is_file() and not file.is_gguf(out):
        raise LlmqError(f"-o {out} is there already, and is no GGUF file: give another name")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise LlmqError(f"-o {out}: give the path of a file, as in model.gguf, in a folder that exists")
    script = converter.find(llama_cpp)
    folder = QuantizedFolder(path, trust_remote_code)
    _check_disk(folder, work or out.absolute().parent)
    name = pre_tokenizer or converter.splitting(folder.path)
    try:
        with (
            tempfile.TemporaryDirectory(dir=work or out.absolute().parent, prefix=".llmq-export-") as inside,
            tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".llmq-export-") as beside,
        ):
            # The converter names a model after its folder.
            dense, converted = Path(inside) / folder.path.resolve().name, Path(inside) / "converted.gguf"
            index, spans = write_dense(folder, dense)
            named = converter.convert(script, dense, converted, folder.dtype, name)
            shutil.rmtree(dense)
            old = file.read(converted)
            planned = _plan(folder, old, index, spans, embedding, prefer)
            news = [made for one in planned for made in _tensors(one)]
            made = Path(beside) / "made.gguf"
            put(
                made,
                file.encode(old, news, file.most_common(news), _data(folder, old, planned)),
                Path(beside) / "partial",
            )
            rows = _verify(folder, old, file.read(made), planned, spans)
            os.replace(made, out)
    except OSError as error:
        way = ": free some there; temporary files go to another disk with --work DIR"
        full = way if error.errno == errno.ENOSPC else ""
        raise LlmqError(f"cannot write {error.filename or out}: {error.strerror}{full}") from error
    used = {weight for one in planned if one.found is not None for weight in one.found.weights.tolist()}
    left = [weight for at, weight in enumerate(folder.weights) if at not in used]
    changed = [weight for weight in left if not _twin(folder, weight, index, used)]
    warnings = list(folder.warnings)
    warnings += [CHANGED.format(", ".join(changed))] if changed else []
    warnings += [SPLIT.format(name)] if named else []
    return Exported(out, out.stat().st_size, tuple(rows), tuple(warnings))


def _twin(folder: QuantizedFolder, name: str, index: RowIndex, used: set[int]) -> bool:
    """Whether a weight has the rows of another one, which was taken for it."""
    found = index.find(folder.weight(name).dequantize(folder.dtype)[:1])
    return found is not None and int(found.weights[0]) in used


def _check_disk(folder: QuantizedFolder, work: Path) -> None:
    """Raises LlmqError if the temporary files would not fit the disk, or there is no such folder."""
    if not work.is_dir():
        raise LlmqError(f"--work {work}: there is no such folder")
    size = sum(prod(folder.shape(name)) for name in folder.weights) * folder.dtype.itemsize
    size += sum(folder.source.info(name).nbytes for name in folder.others)
    # The dense folder and the converted file; the written file comes after the former is gone.
    need, free = 2 * size, shutil.disk_usage(work).free
    if need > free:
        raise LlmqError(
            f"the export needs {need / 2**20:,.0f} MiB for temporary files, and {work} has {free / 2**20:,.0f}: free "
            "some, or give another disk with --work DIR"
        )


def write_dense(folder: QuantizedFolder, dense: Path) -> tuple[RowIndex, list[Span]]:
    """Write the folder dequantized, in its `dtype`; returns the rows of its weights, and what types each needs.

    Raises LlmqError for a weight that no type holds.
    """
    dense.mkdir()
    index = RowIndex()
    spans: list[Span] = []
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        file_name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        put(dense / file_name, encode_tensors(shard)[1], dense / "partial")
        places.update(dict.fromkeys(shard, file_name))
        shard.clear()

    def add(name: str, value: Tensor) -> None:
        shard[name] = value
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            flush()

    for name in folder.weights:
        weight = folder.weight(name)
        spans.append(blocks.span(weight))
        if not blocks.fitting(spans[-1]):
            raise LlmqError(f"{folder.path}: {name} cannot be written as GGUF: {blocks.refusal(spans[-1])}")
        value = weight.dequantize(folder.dtype)
        index.add(value)
        add(name, value)
    for name in folder.others:
        add(name, folder.source.read(name))
    flush()
    for name, source in folder.source.aux_files().items():
        (dense / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, dense / name)
    (dense / "config.json").write_text(folder.config_text, encoding="utf-8")
    (dense / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return index, spans


def _plan(
    folder: QuantizedFolder, old: Contents, index: RowIndex, spans: Sequence[Span], embedding: str, prefer: str | None
) -> list[_Planned]:
    """What to write of each of the converter's tensors."""
    planned = []
    for held in old.tensors:
        same = New(held.name, held.shape, held.kind)
        found = _look_up(old, held, index, {span.width for span in spans})
        if found is None:
            if embedding == "keep" or held.name not in ENDS:
                planned.append(_Planned(held, same, why="not quantized in the folder" if len(held.shape) > 1 else ""))
            elif held.shape[-1] % TYPES["Q8_0"].values:
                planned.append(_Planned(held, same, why=f"Q8_0 has no rows of {held.shape[-1]} numbers, so it stays"))
            else:
                planned.append(_Planned(held, New(held.name, held.shape, TYPES["Q8_0"]), why="rounded to Q8_0"))
            continue
        parts = dict.fromkeys(found.weights.tolist())
        kind, factor = _choose(folder, [*parts], spans, prefer)
        if kind is None:
            names = ", ".join(folder.weights[part] for part in parts)
            planned.append(_Planned(held, same, why=f"no type holds all of {names}"))
        else:
            planned.append(_Planned(held, New(held.name, held.shape, TYPES[kind]), found, factor))
    return planned


def _look_up(old: Contents, held: Held, index: RowIndex, widths: set[int]) -> Found | None:
    """Where all rows of a tensor come from, or None."""
    if len(held.shape) < 2 or held.shape[-1] not in widths or held.kind.name not in ("F32", "F16", "BF16"):
        return None
    weights: list[Numbers] = []
    rows: list[Numbers] = []
    for start, stop in _steps(held):
        found = index.find(old.read(held, start, stop))
        if found is None:
            return None
        weights.append(found.weights)
        rows.append(found.rows)
    return Found(np.concatenate(weights), np.concatenate(rows))


def _steps(held: Held) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows that are read at once."""
    step = max(1, CHUNK // held.row_bytes)
    for start in range(0, held.rows, step):
        yield start, min(held.rows, start + step)


def _choose(
    folder: QuantizedFolder, parts: Sequence[int], spans: Sequence[Span], prefer: str | None
) -> tuple[str | None, float | None]:
    """The type for a tensor made of these weights, and what all of it is multiplied by; no type if none holds all."""
    common = [name for name in blocks.ORDER if all(name in blocks.fitting(spans[part]) for part in parts)]
    if prefer is not None and prefer.upper() in common:
        common = [prefer.upper()]
    for kind in common:
        if kind not in blocks.SCALED:
            return kind, None
        factors = {blocks.tensor_scale(folder.weight(folder.weights[part])) for part in parts}
        if len(factors) == 1:
            return kind, factors.pop()
    return None, None


def _tensors(planned: _Planned) -> list[New]:
    """A tensor, and that of its factor."""
    if planned.factor is None:
        return [planned.new]
    return [planned.new, New(planned.new.name.removesuffix(".weight") + ".scale", (1,), TYPES["F32"])]


def _data(folder: QuantizedFolder, old: Contents, planned: Sequence[_Planned]) -> Iterator[Iterator[Tensor]]:
    """The bytes of every tensor."""
    for one in planned:
        yield _bytes(folder, old, one)
        if one.factor is not None:
            yield iter([torch.tensor([one.factor], dtype=torch.float32)])


def _bytes(folder: QuantizedFolder, old: Contents, one: _Planned) -> Iterator[Tensor]:
    """The bytes of a tensor, in pieces."""
    if one.found is None:
        for start, stop in _steps(one.old):
            value = old.read(one.old, start, stop)
            yield value if one.new.kind is one.old.kind else blocks.round_q8(value)
        return
    made = torch.empty(one.old.rows, one.new.nbytes // one.old.rows, dtype=torch.uint8)
    for part, here, rows in one.found.parts():
        made[here] = blocks.pack(one.new.kind.name, folder.weight(folder.weights[part]))[rows]
    yield made


def _verify(
    folder: QuantizedFolder, old: Contents, new: Contents, planned: Sequence[_Planned], spans: Sequence[Span]
) -> list[Row]:
    """The rows of the report, from the written file: what it decodes to is what the converter wrote.

    Raises LlmqError if it is not.
    """
    written = {held.name: held for held in new.tensors}
    rows = []
    for one in planned:
        held, bits, worst = written[one.new.name], None, 0.0
        if one.found is not None:
            bits = max(spans[part].bits for part in set(one.found.weights.tolist()))
            away = _from_converter(old, new, one, held)
            worst = _from_folder(folder, new, one, held)
            if not (most := max(away, worst)) < FAR:
                raise LlmqError(
                    f"{one.new.name} as {held.kind.name} is not what it was made of (differs by {most:.2g} of its "
                    "largest number): nothing was written; please report this as a bug of llmq"
                )
        rows.append(Row(held.name, held.shape, held.kind.name, held.nbytes, bits, worst, one.why))
    return rows


def _decoded(new: Contents, one: _Planned, held: Held, start: int, stop: int) -> Tensor:
    """Rows of a written tensor, float32."""
    return blocks.unpack(held.kind.name, new.read(held, start, stop)) * (one.factor or 1.0)


def _from_converter(old: Contents, new: Contents, one: _Planned, held: Held) -> float:
    """The largest difference of a written tensor to the converter's, relative to its largest number."""
    largest = worst = 0.0
    for start, stop in _steps(one.old):
        wanted = old.read(one.old, start, stop).float()
        away = (_decoded(new, one, held, start, stop) - wanted).abs_()
        worst, largest = max(worst, float(away.amax())), max(largest, float(wanted.abs().amax()))
    return worst / largest if largest else worst


def _from_folder(folder: QuantizedFolder, new: Contents, one: _Planned, held: Held) -> float:
    """The same to the dequantized weights in float32, which the converter's dtype may round."""
    largest = worst = 0.0
    for part, here, rows in one.found.parts() if one.found is not None else ():
        wanted = folder.weight(folder.weights[part]).dequantize(torch.float32)[rows]
        first = int(here.amin())
        away = (_decoded(new, one, held, first, int(here.amax()) + 1)[here - first] - wanted).abs_()
        worst, largest = max(worst, float(away.amax())), max(largest, float(wanted.abs().amax()))
    return worst / largest if largest else worst
