"""The base model with an adapter merged into it, as a Source: each weight is merged when it is read.

So whatever reads a checkpoint (the streaming quantize job) reads the merged model, which is never whole in memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq.adapters.lora import Adapter, LoraFactors
from llmq.checkpoint.source import FolderSource, Source, Wrapped
from llmq.discovery import blocks as discover
from llmq.discovery.names import link
from llmq.errors import LlmqError
from llmq.formats.bitsandbytes.source import NF4Source, through_nf4

TRAINED_ON = ("auto", "base", "nf4")


@dataclass(frozen=True)
class Change:
    """How a tensor is merged. factors: the change; rounded: to NF4 first; transposed: stored as [in, out]."""

    factors: LoraFactors | None
    rounded: bool
    transposed: bool


class Merged(Wrapped):
    """`base` with `adapter` merged in. changes: tensor → how it is merged.

    trained_on: 'nf4' if the adapter was trained on an NF4 base: each weight that was in NF4 during training is rounded
    to NF4 and back before the adapter's change is added, because the change was learned against those values (Dettmers
    et al., 2023, section 3); 'base' adds it to the weights as they are; 'auto' follows the adapter's record, or 'base'
    if it has none. The weights of a base stored in NF4 are not rounded again.
    Sums are taken in float32 and rounded once to the dtype of the stored weight. Raises LlmqError, naming the first
    weight, if the adapter does not fit the base.
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
        """Match the adapter's modules to tensors. rounded: the modules that were in NF4, if recorded."""
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
            factors, transposed = self.adapter.factors.get(name), stores_transposed(module)
            shape = self.base.info(tensor).shape
            if factors is not None and factors.shape != (shape[::-1] if transposed else shape):
                raise LlmqError(f"{who} by [{factors.shape[0]}, {factors.shape[1]}], and the weight is {[*shape]}")
            if factors is not None and sum(t == tensor for t in links.source.values()) > 1:
                raise LlmqError(f"{who}, whose weight {tensor} is shared with another module: it cannot be merged")
            changes[tensor] = Change(factors, name in nf4, transposed)
        return changes

    def exact(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The merged weight and the adapter's change of it (None if it has none), in float32, in the stored layout."""
        change = self.changes[name]
        weight = self.base.read(name)
        if change.rounded:
            value = weight.to(self.dtype or weight.dtype)
            value = through_nf4(value.t().contiguous() if change.transposed else value, self.double)
            weight = value.t() if change.transposed else value
        if change.factors is None:
            return weight.float(), None
        delta = change.factors.delta()
        delta = delta.t().contiguous() if change.transposed else delta
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
    """A base model: unquantized, or a bitsandbytes NF4 folder, dequantized when read. Raises LlmqError."""
    quantized = FolderSource(folder, trust_remote_code, quantized_ok=True).config.get("quantization_config")
    return NF4Source(folder, trust_remote_code) if quantized else FolderSource(folder, trust_remote_code)


def quantizable(model: nn.Module) -> list[str]:
    """The modules that transformers converts to NF4: linear layers except the output layer and tied ones."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(model))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or stores_transposed(m)]
    return [n for n in linear if n not in kept]


def stores_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
