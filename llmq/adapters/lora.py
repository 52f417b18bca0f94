"""A PEFT LoRA adapter, read from its two files: what it does to each parameter, in float32.

For a weight W [out, in] the adapter holds B [out, r] and A [r, in] and adds s·B·A, with s = α/r, or α/√r for
rank-stabilized LoRA (Hu et al., 2021, section 4.1; Kalajdzievski, 2023). DoRA (Liu et al., 2024) also sets the norm of
each row of the sum. Beside these an adapter can hold whole parameters (modules trained beside it, biases, PEFT's copy
of an embedding), rows of an embedding, and biases of B. What merges otherwise (experts, routed or sampled adapters,
initializations that change the base weights …) is refused: the result would be a different model.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import check_finite
from llmq.checkpoint.tensors import TensorInfo, read_header, read_tensor
from llmq.errors import LlmqError
from llmq.machine import require

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "finetune.json"
"""What `llmq finetune` writes beside the adapter: the base it was trained on, how it was quantized, the losses."""

_PREFIX = "base_model.model."
_COPY = ".base_layer"
_WRAPPERS = (".token_adapter", ".modules_to_save")
_UNUSED = (".original_module.", ".trainable_tokens_original")
_REFUSED = {
    "target_parameters": "adapters of parameters outside linear layers",
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA, which pools inputs",
    "use_bdlora": "block-diagonal adapters",
    "alora_invocation_tokens": "adapters that act on some tokens only",
    "arrow_config": "routed adapters",
    "kasa_config": "KaSA, which changes the base weights",
    "monteclora_config": "sampled adapters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HALVES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
}


@dataclass(frozen=True)
class LoraFactors:
    """The factors of one weight's change. a: [r, in]; b: [out, r]; magnitude: DoRA's norms of the rows, [out].

    embedding: the weight is an embedding, which a model stores as [in, out] = [tokens, width].
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    magnitude: TensorInfo | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the change."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """scale · B · A, float32 [out, in]."""
        return (read_tensor(self.b).float() @ read_tensor(self.a).float()).mul_(self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        """W + delta, each row scaled to DoRA's norm if there is one; float32 [out, in] in, new memory out."""
        total = self.delta().add_(weight)
        if self.magnitude is None:
            return total
        wanted = read_tensor(self.magnitude).float().flatten()
        return total.mul_((wanted / torch.linalg.vector_norm(total, dim=1))[:, None])


@dataclass(frozen=True)
class Shift:
    """What is added to a bias [out]: scale · the bias of B."""

    info: TensorInfo
    scale: float


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that were trained: `info` [len(ids), width] replaces the rows `ids`."""

    info: TensorInfo
    ids: tuple[int, ...]


class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    factors: module path → its change; shifts: module path → what is added to its bias; rows: module path → rows of its
    weight; values: parameter path → the whole parameter; copies: those of `values` that PEFT stored as a copy of the
    base's; record: what `llmq finetune` wrote beside it, empty if another tool trained the adapter. Paths are those of
    the model that was trained. Raises LlmqError, naming the file or weight, if it is missing, damaged, or unsupported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).expanduser()
        config = self.folder / CONFIG
        if not config.is_file():
            raise LlmqError(_no_adapter(self.folder))
        self.config = _object(config)
        _refuse(self.folder, self.config)
        weights = self.folder / WEIGHTS
        if not weights.is_file():
            raise LlmqError(
                f"{self.folder} has no {WEIGHTS} (pickles are not read): save the adapter again with PEFT's "
                "save_pretrained, or convert it once: safetensors.torch.save_file(torch.load('adapter_model.bin', "
                f"weights_only=True), '{WEIGHTS}')"
            )
        self.factors: dict[str, LoraFactors] = {}
        self.shifts: dict[str, Shift] = {}
        self.rows: dict[str, Rows] = {}
        self.values: dict[str, TensorInfo] = {}
        self.copies: set[str] = set()
        self._read(read_header(weights))
        record = self.folder / RECORD
        self.record = _object(record) if record.is_file() else {}

    def _read(self, infos: dict[str, TensorInfo]) -> None:
        halves: dict[str, dict[str, TensorInfo]] = {}
        embeddings = set[str]()
        for stored, info in infos.items():
            name = stored.removeprefix(_PREFIX)
            module, part = _split(name)
            if any(mark in name for mark in _UNUSED):
                continue  # PEFT reads these tensors, and its merged model does not use them
            check_finite(read_tensor(info), stored, info.file)
            if part is not None and len(info.shape) == (2 if part in "AB" else 1):
                halves.setdefault(module, {})[part] = info
                if name.startswith(f"{module}.lora_embedding"):
                    embeddings.add(module)
            elif name.endswith(".token_adapter.trainable_tokens_delta"):
                module = name.removesuffix(".token_adapter.trainable_tokens_delta")
                self.rows[module] = Rows(info, self._ids(module, info))
            elif ".lora_" in name:
                raise LlmqError(
                    f"{self.folder}: {stored} {[*info.shape]} is not a LoRA factor (A or B) of a linear layer or an "
                    "embedding: merge it with the tool that trained it"
                )
            else:
                self._keep_whole(name, info)
        for module, half in halves.items():
            self._pair(module, half, module in embeddings)
        if not (self.factors or self.rows or self.values):
            raise LlmqError(f"{self.folder / WEIGHTS} holds no adapter")

    def _pair(self, module: str, half: dict[str, TensorInfo], embedding: bool) -> None:
        a, b = half.get("A"), half.get("B")
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise LlmqError(f"{self.folder}: the adapter of {module} lacks A or B, or their shapes do not match")
        dora = bool(self.config.get("use_dora"))
        if dora != ("magnitude" in half) or any(
            half[k].shape != b.shape[:1] for k in ("magnitude", "bias") if k in half
        ):
            raise LlmqError(
                f"{self.folder}: the magnitudes or biases of {module} do not fit its factors, or use_dora in {CONFIG} "
                "is not as it was in training: write the adapter again"
            )
        scale = self._scale(module, a.shape[0])
        self.factors[module] = LoraFactors(module, a, b, scale, half.get("magnitude"), embedding)
        if "bias" in half:
            self.shifts[module] = Shift(half["bias"], scale)

    def _keep_whole(self, name: str, info: TensorInfo) -> None:
        """A tensor that is no LoRA factor: a parameter's whole value, or PEFT's copy of the base's."""
        module, _, leaf = name.rpartition(".")
        for wrapper in _WRAPPERS:
            module = module.removesuffix(wrapper)
        own = module.removesuffix(_COPY)
        for wrapper in _WRAPPERS:
            own = own.removesuffix(wrapper)
        parameter = f"{own}.{leaf}"
        self.values[parameter] = info
        if not self._trained(own, leaf):
            self.copies.add(parameter)

    def _trained(self, module: str, leaf: str) -> bool:
        """Whether a parameter is one that training changed, by the config: of a bias, or of a module trained whole."""
        if leaf == "bias" and self.config.get("bias", "none") != "none":
            return True
        saved = self.config.get("modules_to_save") or []
        tied = bool(saved) and bool(self.config.get("ensure_weight_tying"))
        return tied or any(f"{name}." in f"{module}." for name in saved)

    def _ids(self, module: str, info: TensorInfo) -> tuple[int, ...]:
        """The ids of the trained rows of a module."""
        given = self.config.get("trainable_token_indices") or []
        lists = given if isinstance(given, dict) else {module: given}
        ids = next((ids for key, ids in lists.items() if module == key or module.endswith(f".{key}")), [])
        if len(info.shape) != 2 or len(ids) != info.shape[0] or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise LlmqError(
                f"{self.folder}: {module} has {info.shape[0]} trained rows, and trainable_token_indices in {CONFIG} "
                "does not name as many: restore it, or write the adapter again"
            )
        return tuple(ids)

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha", 8)
        patterns = self.config.get("alpha_pattern") or {}
        if patterns:
            require("peft", "reading an adapter with an alpha_pattern")
            from peft.utils.other import get_pattern_key

            alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def base(self) -> str:
        """The base model that the adapter names, or an empty string."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def digest(self) -> str:
        """sha256 of the two files."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def _split(name: str) -> tuple[str, str | None]:
    """A stored name as the module's path and the part of its adapter, None if it is not a known part."""
    for ending, part in _HALVES.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), part
    return name, None


def _no_adapter(folder: Path) -> str:
    """Why a folder is no adapter, and what to give in its place."""
    if not folder.is_dir():
        return (
            f"{folder} is not a folder: give the folder of an adapter; one on the hub is downloaded by "
            "hf download NAME --local-dir FOLDER"
        )
    found = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
    if found:
        return (
            f"{folder} is not an adapter folder: it has no {CONFIG}, and {len(found)} folders in it have one: give one "
            f"of them, such as {found[-1]}"
        )
    return f"{folder} is not an adapter folder: it has no {CONFIG}; give the folder that finetune wrote"


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlmqError(f"{file} cannot be read ({error}): restore it, or write the adapter again") from error
    if not isinstance(value, dict):
        raise LlmqError(f"{file} is not a JSON object: restore it, or write the adapter again")
    return value


def _refuse(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LlmqError(f"{folder} is an adapter of type {kind}, and only LORA can be merged here: use PEFT for it")
    found = [words for key, words in _REFUSED.items() if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        found.append(f"the initialization {start}, which changes the base weights")
    if found:
        raise LlmqError(
            f"{folder} has {' and '.join(found)}: merge supports LoRA of linear layers and embeddings only; merge it "
            "with PEFT (merge_and_unload), save_pretrained to a new folder, then quantize that"
        )
