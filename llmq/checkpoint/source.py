"""The checkpoint that is quantized: a folder of safetensors, checked at once and read lazily, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq.checkpoint import strangers
from llmq.checkpoint.files import INDEX, PICKLES, QUANTIZED, REPORT, SINGLE, goes_along, modules_beside, named_templates
from llmq.checkpoint.store import LOCAL, Store
from llmq.checkpoint.tensors import TensorInfo, expect, read_header, read_rows, read_tensor
from llmq.errors import LlmqError

# Not copied: these files describe the source's own weights, which is wrong for the quantized ones.
_LEFT = {"config.json", "params.json", "adapter_config.json", *QUANTIZED, REPORT}
_CARRIED_MAX = 128 << 20
_SIDE_BY_SIDE = 8


class Source(Protocol):
    """A checkpoint to read: a folder, or a folder whose tensors are changed when read (as `Wrapped` does).

    config: the contents of config.json; folder: the folder of config.json, the tokenizer and the licence; warnings:
    what a plan tells of how it is read.
    """

    folder: Path
    trust_remote_code: bool
    config: dict[str, Any]
    warnings: tuple[str, ...]

    def names(self) -> list[str]:
        """Every tensor, in the order in which it is cheapest to read them."""

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and file of a tensor as `read` gives it. Raises KeyError for a name that is not there."""

    def read(self, name: str) -> Tensor:
        """The tensor, in newly allocated memory. Raises LlmqError if the file cannot be read or became shorter."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop−1 of a tensor. Raises as read, and IndexError out of range."""

    def expect(self, name: str) -> None:
        """Let the system read a tensor beforehand: a hint."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""

    def aux_files(self) -> dict[str, Path]:
        """The files that are copied unchanged to the output: name in the model's folder → file, sorted by name."""

    def fingerprint(self) -> str:
        """A hash that identifies the checkpoint."""


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint."""
    return {name: tuple(source.info(name).shape) for name in source.names()}


class FolderSource:
    """A model folder: its config, and its tensors by name.

    All checks that read no weights are made here, in well under a second per hundred shards. Raises LlmqError, in one
    line that names the file or tensor and the remedy, if: the folder or its config.json is missing or unreadable; the
    weights are pickles or missing; a shard is missing, truncated, too long or damaged; the index names a tensor that
    its shard lacks; the model is already quantized (unless quantized_ok, or what that returns for its config.json)
    or needs code of its own (unless trust_remote_code).

    store: where the weights are, if not in the folder.
    """

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool = False,
        *,
        quantized_ok: bool | Callable[[dict[str, Any]], bool] = False,
        store: Store = LOCAL,
    ) -> None:
        self.folder = Path(folder)
        self.store = store
        self.trust_remote_code = trust_remote_code
        self.index: Path | None = None
        try:
            self._open(quantized_ok)
        except OSError as error:
            raise LlmqError(f"cannot read {error.filename or self.folder}: {error.strerror}") from error

    def _open(self, quantized_ok: bool | Callable[[dict[str, Any]], bool]) -> None:
        if not self.folder.is_dir():
            what = "is a file, not a model folder" if self.folder.exists() else "does not exist"
            told = strangers.of_file(self.folder) if self.folder.is_file() else None
            what += f" ({told})" if told else ""
            raise LlmqError(f"{self.folder} {what}: give the folder that holds config.json and the safetensors files")
        self.config: dict[str, Any] = _read_config(self.folder)
        if not (quantized_ok(self.config) if callable(quantized_ok) else quantized_ok):
            _refuse_quantized(self.folder, self.config)
        if not self.trust_remote_code:
            _refuse_remote_code(self.folder, self.config)
        weight_map: dict[str, str] = {}
        shards = self._single()
        if shards is None:
            self.index = self.folder / INDEX
            weight_map = _read_index(self.index)
            shards = [self.folder / name for name in sorted(set(weight_map.values()))]
        self.shards: list[Path] = shards
        self._infos = self._headers(weight_map)
        self.warnings: tuple[str, ...] = self.store.told(self.total_bytes)

    def _single(self) -> list[Path] | None:
        """The one weights file, or None where an index names several."""
        if self.store.size(self.folder / SINGLE) is not None:
            return [self.folder / SINGLE]
        if (self.folder / INDEX).exists():
            return None
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            if told := strangers.of_single(found[0]):
                raise LlmqError(f"{self.folder} {told}")
            return found
        if found:
            raise LlmqError(
                f"{self.folder} has {len(found)} safetensors files but no {INDEX} that says which are the model: "
                "download the index as well"
            )
        pickles = sorted(path.name for path in self.folder.iterdir() if path.name.endswith(PICKLES))
        if pickles:
            raise LlmqError(
                f"{self.folder} has its weights as pickles only ({pickles[0]}), which can run code when opened and are "
                "not read: convert it once with transformers (from_pretrained, then save_pretrained to a new folder)"
            )
        if told := strangers.of_folder(self.folder):
            raise LlmqError(f"{self.folder} {told}")
        raise LlmqError(f"{self.folder} has no weights: neither {INDEX} nor a safetensors file; download it again")

    def _headers(self, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
        """All tensors in file order, unlisted ones too. If two shards hold the same tensor, the index decides."""
        infos: dict[str, TensorInfo] = {}
        listed = set(weight_map.values())
        for shard in self.shards:
            if self.store.size(shard) is None:
                raise LlmqError(f"shard {shard.name}, named by {self.index}, is missing: download it again")
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            headers = pool.map(partial(read_header, store=self.store), self.shards)
            for shard, header in zip(self.shards, headers, strict=True):
                here = {given for given in listed if self.folder / given == shard}
                for name, info in header.items():
                    if name not in weight_map or weight_map[name] in here:
                        infos[name] = info
        for name, shard_name in weight_map.items():
            if name not in infos:
                raise LlmqError(
                    f"{self.index} says that tensor {name} is in {shard_name}, but it is not: the index and the "
                    "shards are of different models, download both again"
                )
        return infos

    def names(self) -> list[str]:
        """Every tensor, in the order in which it is cheapest to read them: by file, then by offset."""
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and position of a tensor. Raises KeyError for an unknown name."""
        return self._infos[name]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, in newly allocated memory. Raises LlmqError if the file cannot be read."""
        return read_tensor(self._infos[name], self.store)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop−1 of a tensor, without reading the others. Raises as read, and IndexError out of range."""
        return read_rows(self._infos[name], start, stop, self.store)

    def expect(self, name: str) -> None:
        """See `Source.expect`: only of a file on disk."""
        if self.store is LOCAL:
            expect(self._infos[name])

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._infos.values())

    def aux_files(self) -> dict[str, Path]:
        """The files that are copied unchanged: tokenizer, generation, processor, chat templates, licence.

        Weights, indexes, config.json, model cards, pickles and subfolders are not copied, but for the folder of named
        chat templates and those that a modules.json names; Python files only if the config names them.
        """
        code = "auto_map" in self.config
        found = {path.name: path for path in self.folder.iterdir() if goes_along(path.name, code=code)}
        found |= named_templates(self.folder) | modules_beside(self.folder)
        return {
            name: path
            for name, path in sorted(found.items())
            if path.is_file()
            and not path.name.startswith(".")
            and name not in _LEFT
            and path.stat().st_size <= _CARRIED_MAX
        }

    def fingerprint(self) -> str:
        """A hash that identifies the checkpoint, without reading all of it.

        It covers config.json, the index, and each shard's name, size, and what its store has for its contents
        (`Store.proof`). Checkpoints on disk that differ only in a few weights may have the same hash. Raises LlmqError
        if a file cannot be read.
        """
        digest = hashlib.sha256()

        def add(data: bytes) -> None:
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

        for path in (self.folder / "config.json", self.index):
            add(b"" if path is None else _read_bytes(path))
        for shard in self.shards:
            try:
                for part in (shard.name.encode(), str(self.store.size(shard)).encode(), *self.store.proof(shard)):
                    add(part)
            except OSError as error:
                raise LlmqError(f"cannot read {shard}: {error.strerror}") from error
        return digest.hexdigest()


class Wrapped:
    """A source that changes some tensors of a base: whatever a subclass does not override is the base's."""

    def __init__(self, base: Source) -> None:
        self.base = base
        self.folder, self.trust_remote_code, self.config = base.folder, base.trust_remote_code, base.config
        self.warnings = base.warnings

    def names(self) -> list[str]:
        """See `Source.names`."""
        return self.base.names()

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        return self.base.info(name)

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        return self.base.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Source.read_rows`; the whole tensor is read if `read` changes it."""
        return self.read(name)[start:stop] if self.changes_tensor(name) else self.base.read_rows(name, start, stop)

    def expect(self, name: str) -> None:
        """See `Source.expect`: only of a tensor that is the base's."""
        if not self.changes_tensor(name):
            self.base.expect(name)

    def changes_tensor(self, name: str) -> bool:
        """Whether `read` returns a tensor that differs from the base's."""
        return False

    @property
    def total_bytes(self) -> int:
        """See `Source.total_bytes`."""
        return sum(self.info(name).nbytes for name in self.names())

    def aux_files(self) -> dict[str, Path]:
        """See `Source.aux_files`."""
        return self.base.aux_files()

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self.base.fingerprint()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LlmqError(f"cannot read {path}: {error.strerror}") from error


def _read_object(path: Path) -> dict[str, Any]:
    raw = _read_bytes(path)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if told := strangers.of_bytes(raw, text_file=True):
            raise LlmqError(f"{path} is {told}") from error
        raise LlmqError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise LlmqError(f"{path} is not a JSON object: download it again")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        told = strangers.of_folder(folder)
        told = told or "is not a model folder: it has no config.json; give the folder that holds it and the weights"
        raise LlmqError(f"{folder} {told}")
    return _read_object(path)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LlmqError(f"{path} has no weight_map: download it again")
    known: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in known:
            continue
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise LlmqError(
                f"{path} places tensor {name} in {shard!r}, which is no file of this folder: download it again"
            )
        known.add(shard)
    return weight_map


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in nested:
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                method = part[key].get("quant_method") if isinstance(part[key], dict) else None
                raise LlmqError(f"{folder} is already quantized ({method or key}): start from the unquantized model")


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    if not config.get("auto_map"):
        return
    # Imported here because it takes seconds. Many configs name custom code for models that transformers now includes.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LlmqError(
            f"{folder} needs Python code of its own (auto_map in config.json; transformers has no {kind!r}): "
            "read that code, then say --trust-remote-code"
        )


def check_finite(tensor: Tensor, name: str, file: Path | None = None) -> None:
    """Raises LlmqError, naming the weight, its file and the first bad place, if there is a NaN or an infinity.

    Allocates almost nothing: only the minimum and maximum are computed, and a NaN propagates to both.
    """
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return
    flat = tensor.detach().reshape(-1)
    step = flat.numel() if tensor.dtype.itemsize > 1 else 1 << 22  # 8-bit floats have no minimum: converted in pieces
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        if tensor.dtype.itemsize == 1:
            piece = piece.float()
        low, high = torch.aminmax(piece)
        if bool(torch.isfinite(low) & torch.isfinite(high)):
            continue
        first = start + int(torch.isfinite(piece).logical_not_().to(torch.uint8).argmax())
        place = [int(index) for index in torch.unravel_index(torch.tensor(first), tensor.shape)]
        where = f" in {file}" if file else ""
        raise LlmqError(
            f"{name}{where} has {float(flat[first].float())} at {place}: the weight is damaged, download or repair it"
        )
