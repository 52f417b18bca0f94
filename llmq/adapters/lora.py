"""A PEFT LoRA adapter, read from its two files: the change that it adds to each weight, in float32.

For a weight W [out, in] the adapter holds B [out, r] and A [r, in] and adds s·B·A, with s = α/r, or α/√r for
rank-stabilized LoRA (Hu et al., 2021, section 4.1; Kalajdzievski, 2023). Adapters with anything else (DoRA, trained
biases or embeddings, initializations that change the base weights …) are refused: merging only s·B·A would give a
different model.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.tensors import TensorInfo, read_header, read_tensor
from llmq.errors import LlmqError
from llmq.machine import require

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "finetune.json"
"""What `llmq finetune` writes beside the adapter: the base it was trained on, how it was quantized, the losses."""

_PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": "DoRA, which rescales whole weights",
    "modules_to_save": "whole modules trained beside it",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of parameters outside linear layers",
    "layer_replication": "replicated layers",
    "lora_bias": "trained biases",
    "use_qalora": "QA-LoRA, which pools inputs",
    "use_bdlora": "block-diagonal adapters",
    "alora_invocation_tokens": "adapters that act on some tokens only",
    "arrow_config": "routed adapters",
    "kasa_config": "KaSA, which changes the base weights",
    "monteclora_config": "sampled adapters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one weight's change, and their scale. a: [r, in]; b: [out, r]."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the change."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """scale · B · A, float32 [out, in]."""
        return (read_tensor(self.b).float() @ read_tensor(self.a).float()).mul_(self.scale)


class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    factors: module path in the model → its change; record: what `llmq finetune` wrote beside it, empty if another tool
    trained the adapter. Raises LlmqError, naming the file or weight, if it is missing, damaged, or not plain LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).expanduser()
        config = self.folder / CONFIG
        if not config.is_file():
            raise LlmqError(
                f"{self.folder} is not an adapter folder: it has no {CONFIG}; give the folder that finetune wrote"
            )
        self.config = _object(config)
        _refuse(self.folder, self.config)
        weights = self.folder / WEIGHTS
        if not weights.is_file():
            raise LlmqError(
                f"{self.folder} has no {WEIGHTS} (pickles are not read): save the adapter again with PEFT's "
                "save_pretrained"
            )
        self.factors = self._pairs(read_header(weights))
        record = self.folder / RECORD
        self.record = _object(record) if record.is_file() else {}

    def _pairs(self, infos: dict[str, TensorInfo]) -> dict[str, LoraFactors]:
        halves: dict[str, dict[str, TensorInfo]] = {}
        for name, info in infos.items():
            module, _, rest = name.removeprefix(_PREFIX).rpartition(".lora_")
            if rest not in ("A.weight", "B.weight") or len(info.shape) != 2:
                raise LlmqError(
                    f"{self.folder}: {name} {[*info.shape]} is not a LoRA factor (A or B) of a linear layer: "
                    "merge it with the tool that trained it"
                )
            halves.setdefault(module, {})[rest[0]] = info
        factors = {}
        for module, half in halves.items():
            a, b = half.get("A"), half.get("B")
            if a is None or b is None or a.shape[0] != b.shape[1]:
                raise LlmqError(f"{self.folder}: the adapter of {module} lacks A or B, or their shapes do not match")
            factors[module] = LoraFactors(module, a, b, self._scale(module, a.shape[0]))
        if not factors:
            raise LlmqError(f"{self.folder / WEIGHTS} holds no adapter")
        return factors

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
    if config.get("bias", "none") != "none":
        found.append("trained biases")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        found.append(f"the initialization {start}, which changes the base weights")
    if found:
        raise LlmqError(
            f"{folder} has {' and '.join(found)}: merge supports plain LoRA of linear layers only; merge it with PEFT "
            "(merge_and_unload), then quantize the result"
        )
