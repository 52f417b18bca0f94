"""A model that is evaluated: its folder, its files' fingerprint, and the versions and machine for its results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, first_line
from llmq.grids.cache import Cache
from llmq.report.report import VERSIONS

_SMALL = 1 << 25
"""Files up to this size in bytes are hashed whole; larger ones by samples and modification time."""
_SAMPLES, _SAMPLE = 256, 4096
_IGNORED = ("report.json", "report.html", "README.md", ".gitattributes")


@dataclass(frozen=True)
class Subject:
    """given: the user's name for it; label: a hub id, 'demo', or the folder's absolute path; cache: how its keys and
    values are rounded while it is measured, None: as its loader has them. Both names then say so, and whose scales."""

    given: str
    label: str
    folder: Path
    cache: Cache | None = None

    @staticmethod
    def of(given: str, *, cache: Cache | None = None, trust_remote_code: bool = False) -> Subject:
        """Find a model by folder, hub id or 'demo'. Raises LlmqError as `llmq.checkpoint.hub.resolve` does."""
        from llmq.checkpoint.hub import resolve

        folder = resolve(given, trust_remote_code=trust_remote_code)
        local = given != "demo" and Path(given).expanduser().is_dir()
        label, how = str(folder.resolve()) if local else given, ""
        if cache is not None:
            from llmq.inference.cache import stored_scales

            how = f" [{cache} cache, {'its own scales' if stored_scales(folder, cache) else 'scales per window'}]"
        return Subject(f"{given}{how}", f"{label}{how}", folder, cache)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's files, 12 hexadecimal digits: contents of small files, samples and times of large
        ones.
        """
        digest = hashlib.sha256(b"" if self.cache is None else f"{self.cache} cache\n".encode())
        for file in sorted(self.folder.iterdir()):
            if not file.is_file() or file.name in _IGNORED or file.name.startswith("."):
                continue
            try:
                state = file.stat()
                large = state.st_size > _SMALL
                what = f"{state.st_mtime_ns} {_sampled(file, state.st_size)}" if large else _whole(file)
            except OSError as error:
                raise LlmqError(f"{file} cannot be read: {error.strerror}") from error
            digest.update(f"{file.name} {state.st_size} {what}\n".encode())
        return digest.hexdigest()[:12]

    @cached_property
    def quantized(self) -> str:
        """transformers' name of its quantization method; '' if it is not quantized."""
        from llmq.inference.pretrained import check_readable

        quantization = check_readable(self.folder, kernels=True).get("quantization_config")
        return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else ""

    @cached_property
    def weights(self) -> tuple[int, int, float]:
        """The number of elements of all weights, their bytes on disk, bits per weight (0 if the layout is unknown)."""
        from llmq.formats.inspection import inspect_folder

        try:
            found = inspect_folder(self.folder)
            if found.bits_per_weight is None:
                return found.nbytes, found.nbytes, 0.0
        except LlmqError:
            # Everything that from_pretrained loads can be measured, also checkpoints that are not safetensors.
            kinds = (".safetensors", ".bin", ".pt", ".gguf")
            nbytes = sum(file.stat().st_size for file in self.folder.iterdir() if file.suffix in kinds)
            return nbytes, nbytes, 0.0
        return found.size, found.nbytes, found.bits_per_weight


def _whole(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sampled(file: Path, nbytes: int) -> str:
    """A hash of the beginning (with the safetensors header) and of samples of the whole file."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        digest.update(data.read(1 << 20))
        for number in range(_SAMPLES):
            data.seek(number * (nbytes - _SAMPLE) // (_SAMPLES - 1))
            digest.update(data.read(_SAMPLE))
    return digest.hexdigest()


def key(*parts: Any) -> str:
    """A hash of plain data, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions(*more: str) -> dict[str, str]:
    """The versions of installed packages that can change results."""
    found = {}
    for name in (*VERSIONS, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"python": sys.version.split()[0]}


def check_device(device: str) -> None:
    """Raise LlmqError if torch does not have the device here, or it cannot be used; 'auto' is always accepted."""
    import torch

    if device == "auto":
        return
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing is computed there")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = first_line(error)
        told = (
            "torch knows no such device"
            if told.startswith(("Expected one of", "Invalid device string"))
            else told[:160]
        )
        raise LlmqError(f"--device {device} cannot be used here: {told}; there are cpu, cuda, auto") from error


def machine(device: str) -> dict[str, str]:
    """The machine on which results are measured."""
    import torch

    from llmq.inference.pretrained import input_device

    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
    }
    if (place := input_device(device)).startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(place)
    return found | {"device": device}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor() or "unknown"


def default_out(environment: Mapping[str, str] = os.environ) -> Path:
    """The default of --out: $XDG_CACHE_HOME/llmq/eval, or ~/.cache/llmq/eval."""
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "llmq" / "eval"
