"""A folder written again in another format (`targets`): one weight in memory, read back before it gets its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.files import INDEX, put
from llmq.checkpoint.source import FolderSource
from llmq.checkpoint.tensors import encode
from llmq.errors import LlmqError
from llmq.export.folder import QuantizedFolder
from llmq.export.targets import TARGETS, Target, Told
from llmq.formats.inspection import Alike, inspect_folder
from llmq.grids.base import QuantizedWeight
from llmq.validate import made

SHARD = 1 << 28
FAR = 2.0**-7
"""See `gguf`: what biases in bfloat16 come to is below."""


@dataclass(frozen=True)
class Rewritten:
    """A written folder. schemes: what its configuration says of weights, in words → how many; dense: the matrices that
    are not quantized; worst: the largest difference of a weight to the folder's, relative to its largest number;
    warnings: what of the folder is not exported."""

    path: Path
    nbytes: int
    schemes: dict[str, int]
    dense: tuple[str, ...]
    worst: float
    warnings: tuple[str, ...]


def rewrite(path: Path, out: Path, to: str, trust_remote_code: bool = False) -> Rewritten:
    """Write a quantized folder in another format.

    to: one of TARGETS; out: a folder that does not exist, or is empty. Raises LlmqError if the format does not hold the
    folder, or the disk is full; then nothing is left behind.
    """
    target, folder = TARGETS[to], QuantizedFolder(path, trust_remote_code)
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LlmqError(f"-o {out} is there already: give the name of a new folder")
    if not out.parent.is_dir():
        raise LlmqError(f"-o {out}: there is no folder {out.parent}")
    joined = [
        line.name
        for line in inspect_folder(path).lines
        if isinstance(line, Alike) and any(row.bits for row in line.rows)
    ]
    if joined:
        raise LlmqError(
            f"{path}: programs for {target.name} join the experts of {joined[0]} while they load them, and leave out "
            "their scales: export it to gguf"
        )
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".llmq-export-") as inside:
            fresh = Path(inside) / out.name
            told = _write(folder, fresh, target)
            worst = _verify(folder, fresh, target, told)
            fresh.chmod(0o755)
            os.replace(fresh, out)
    except OSError as error:
        full = ": free some, or write to another disk" if error.errno == errno.ENOSPC else ""
        raise LlmqError(f"cannot write {error.filename or out}: {error.strerror}{full}") from error
    words = Counter(" ".join(f"{key} {value}" for key, value in one.items()) for one in told.values())
    dense = tuple(name for name in folder.others if len(folder.source.info(name).shape) > 1)
    size = sum(file.stat().st_size for file in out.iterdir())
    return Rewritten(out, size, dict(words.most_common()), dense, worst, tuple(folder.warnings))


def _write(folder: QuantizedFolder, out: Path, target: Target) -> dict[str, Told]:
    """Write all files; returns what the configuration says of each weight."""
    out.mkdir()
    told: dict[str, Told] = {}
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        put(out / name, encode(shard)[1], out / "partial")
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name in folder.weights:
        weight, where = folder.weight(name), f"{folder.path}: {name}"
        if not isinstance(weight, QuantizedWeight):
            raise LlmqError(f"{where} is {weight.scheme}, which only GGUF has: export it to gguf")
        told[name] = made(lambda weight=weight: target.told(weight), where)  # type: ignore[misc]
        tensors = made(lambda weight=weight, one=told[name]: target.pack(weight, one), where)  # type: ignore[misc]
        shard |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            flush()
    for name in folder.others:
        shard[name] = folder.source.read(name)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            flush()
    flush()
    config: dict[str, Any] = folder.config | target.config(folder, told)
    for name, source in folder.source.aux_files().items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, out / name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2) + "\n", encoding="utf-8")
    return told


def _verify(folder: QuantizedFolder, out: Path, target: Target, told: dict[str, Told]) -> float:
    """The largest difference of a weight that is read back. Raises LlmqError if it is none that rounding makes."""
    written = FolderSource(out, folder.source.trust_remote_code, quantized_ok=True)
    stored: dict[str, list[str]] = {}
    for name in written.names():
        stored.setdefault(name.rpartition(".")[0], []).append(name)
    worst = 0.0
    for name, one in told.items():
        module = name.removesuffix(".weight")
        tensors = {part.rpartition(".")[2]: written.read(part) for part in stored[module] if not part.endswith(".bias")}
        wanted = folder.weight(name).dequantize(torch.float32)
        away = (target.unpack(tensors, one) - wanted).abs().amax() / wanted.abs().amax().clamp(min=1e-30)
        worst = max(worst, float(away))
        if not float(away) < FAR:
            raise LlmqError(
                f"{name} as {target.name} is not what it was made of (differs by {float(away):.2g} of its largest "
                "number): nothing was written; please report this as a bug of llmq"
            )
    return worst
