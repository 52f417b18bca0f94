"""The base model with an adapter merged into it, as a Source: weights are added up when they are read, one at a time.

So whatever reads a checkpoint (the streaming quantize job) reads the merged model, and nothing holds the whole of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.adapters.lora import Adapter, LoraFactors
from llmq.checkpoint.source import FolderSource, Source, Wrapped
from llmq.checkpoint.tensors import TensorInfo
from llmq.discovery import blocks as discover
from llmq.discovery.names import link
from llmq.errors import LlmqError
from llmq.machine import require

TRAINED_ON = ("auto", "base", "nf4")
BLOCK = 64
"""Weights that share a scale in NF4, the only block size that QLoRA and transformers use."""
_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


class NF4Source(Wrapped):
    """A folder that bitsandbytes quantized to NF4, read as the weights that its codes stand for.

    A quantized weight's dtype and shape are those it had before. Raises LlmqError for a folder that is quantized in
    another way.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        super().__init__(FolderSource(folder, trust_remote_code, quantized_ok=True))
        if not is_nf4(self.config):
            raise LlmqError(f"{folder} is quantized, and not by bitsandbytes to NF4: start from the unquantized model")
        self.config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        stored = set(self.base.names())
        self.quantized = {n.removesuffix(_STATE): self._info(n.removesuffix(_STATE)) for n in stored if _STATE in n}
        parts = {name + part for name in self.quantized for part in _PARTS}
        self._names = [name for name in self.base.names() if name not in parts]

    def _info(self, name: str) -> TensorInfo:
        state = json.loads(bytes(self.base.read(name + _STATE).tolist()))
        shape, dtype = tuple(int(n) for n in state["shape"]), getattr(torch, state["dtype"])
        return TensorInfo(name, dtype, shape, self.base.info(name).file, 0, math.prod(shape) * dtype.itemsize)

    def names(self) -> list[str]:
        """See `Source.names`: the weights, without what quantization stores beside them."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`: a weight as it was before it was quantized."""
        return self.quantized.get(name) or self.base.info(name)

    def changes_tensor(self, name: str) -> bool:
        """See `Wrapped.changes_tensor`."""
        return name in self.quantized

    def read(self, name: str) -> Tensor:
        """The tensor in the dtype it had, dequantized by bitsandbytes where it is quantized."""
        if name not in self.quantized:
            return self.base.read(name)
        bnb = require("bitsandbytes", "reading an NF4 model")
        stored = set(self.base.names())
        parts = {f"w{p}": self.base.read(name + p) for p in _PARTS if name + p in stored}
        state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        value: Tensor = bnb.functional.dequantize_4bit(self.base.read(name), state)
        return value


@dataclass(frozen=True)
class Change:
    """One tensor. factors: what the adapter adds; rounded: to NF4 first; turned: stored as [in, out]."""

    factors: LoraFactors | None
    rounded: bool
    turned: bool


class Merged(Wrapped):
    """`base` with `adapter` merged in. changes: tensor → what becomes of it.

    trained_on: 'nf4' where the tune was made on an NF4 base: each weight that was quantized then is rounded to NF4 and
    back before the adapter's change is added, because the change was learned against those values (Dettmers et al.,
    2023, section 3); 'base' adds it to the weights as they are; 'auto' does what the adapter's record says, and 'base'
    where it has none. A base that is an NF4 folder is what it is.
    Sums are taken in float32 and rounded once to the dtype of the stored weight. Raises LlmqError, naming the first
    weight, where the adapter does not fit the base.
    """

    def __init__(self, base: Source, adapter: Adapter, trained_on: str = "auto") -> None:
        if trained_on not in TRAINED_ON:
            raise LlmqError(f"--trained-on must be one of {', '.join(TRAINED_ON)}, not {trained_on!r}")
        super().__init__(base)
        self.adapter = adapter
        record = adapter.record.get("base", {})
        if trained_on == "auto":
            trained_on = "nf4" if record.get("bits") == 4 else "base"
        self.trained_on = trained_on
        self.double = bool(record.get("double_quant", True))
        self.dtype = getattr(torch, record["dtype"]) if "dtype" in record else None
        self.changes = self._fit(record.get("nf4"))

    def _fit(self, rounded: list[str] | None) -> dict[str, Change]:
        """Match the adapter's modules to tensors. rounded: modules that were NF4, where it is recorded."""
        model = discover.build(self.folder, torch.float32, self.trust_remote_code)
        links = link(model, self.base.names())
        modules = dict(model.named_modules())
        nf4 = set[str]()
        if self.trained_on == "nf4" and not isinstance(self.base, NF4Source):
            nf4 = set(quantizable(model) if rounded is None else rounded)
        changes = {}
        for name in dict.fromkeys([*self.adapter.factors, *sorted(nf4)]):
            module, tensor = modules.get(name), links.source.get(f"{name}.weight")
            who = f"{self.adapter.folder} does not fit {self.folder}: it changes {name}"
            if module is None:
                raise LlmqError(f"{who}, which this model does not have: give the base it was trained on")
            if tensor is None:
                why = links.converted.get(f"{name}.weight", "the checkpoint has no weight for it")
                raise LlmqError(f"{who}, which cannot be merged: {why}")
            factors, turned = self.adapter.factors.get(name), turned_around(module)
            shape = self.base.info(tensor).shape
            if factors is not None and factors.shape != (shape[::-1] if turned else shape):
                raise LlmqError(f"{who} by [{factors.shape[0]}, {factors.shape[1]}], and the weight is {[*shape]}")
            if factors is not None and sum(t == tensor for t in links.source.values()) > 1:
                raise LlmqError(f"{who}, whose weight {tensor} serves another module too: it cannot be merged")
            changes[tensor] = Change(factors, name in nf4, turned)
        return changes

    def exact(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The merged weight in float32, and the adapter's part of it (None where it has none), as stored."""
        change = self.changes[name]
        weight = self.base.read(name)
        if change.rounded:
            value = weight.to(self.dtype or weight.dtype)
            value = through_nf4(value.t().contiguous() if change.turned else value, self.double)
            weight = value.t() if change.turned else value
        if change.factors is None:
            return weight.float(), None
        delta = change.factors.delta()
        delta = delta.t().contiguous() if change.turned else delta
        return weight.float() + delta, delta

    def read(self, name: str) -> Tensor:
        """The tensor as merged, in the dtype that the base stores it in."""
        return self.exact(name)[0].to(self.info(name).dtype) if name in self.changes else self.base.read(name)

    def changes_tensor(self, name: str) -> bool:
        """See `Wrapped.changes_tensor`."""
        return name in self.changes

    def fingerprint(self) -> str:
        """A hash of the base, the adapter and how they are merged."""
        rounded = sorted(name for name, change in self.changes.items() if change.rounded)
        parts = [self.base.fingerprint(), self.adapter.digest, str(self.dtype), self.double, rounded]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_base(folder: Path, trust_remote_code: bool = False) -> Source:
    """A base model: unquantized, or a bitsandbytes NF4 folder read as what its codes stand for. Raises LlmqError."""
    quantized = FolderSource(folder, trust_remote_code, quantized_ok=True).config.get("quantization_config")
    return NF4Source(folder, trust_remote_code) if quantized else FolderSource(folder, trust_remote_code)


def is_nf4(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that bitsandbytes quantized to NF4."""
    section = config.get("quantization_config")
    return (
        isinstance(section, dict) and bool(section.get("load_in_4bit")) and section.get("bnb_4bit_quant_type") == "nf4"
    )


def quantizable(model: nn.Module) -> list[str]:
    """The modules that transformers turns into NF4 ones: linear, and not the output layer or tied to another."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(model))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or turned_around(m)]
    return [n for n in linear if n not in kept]


def turned_around(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def through_nf4(weight: Tensor, double: bool) -> Tensor:
    """[out, in] to NF4 and back by bitsandbytes, in the weight's dtype: what an NF4 base computes with."""
    functional = require("bitsandbytes", "merging a tune of an NF4 base").functional
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    value: Tensor = functional.dequantize_4bit(codes, state)
    return value
