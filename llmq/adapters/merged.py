"""The base model with an adapter merged into it, as a Source: each weight is merged when it is read.

So whatever reads a checkpoint (the streaming quantize job) reads the merged model, which is never whole in memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq.adapters.lora import Adapter, LoraFactors, Rows, Shift
from llmq.adapters.places import Place, Places
from llmq.adapters.tokenizer import Carried
from llmq.checkpoint.source import FolderSource, Source, Wrapped
from llmq.checkpoint.tensors import TensorInfo, read_tensor
from llmq.errors import LlmqError
from llmq.formats.bitsandbytes.source import NF4Source, through_nf4
from llmq.formats.dequantized import open_source, reads

TRAINED_ON = ("auto", "base", "nf4")
UNTIE = (
    ", so the two would no longer be equal: untie the base first (clone the weight of its output layer, set "
    "tie_word_embeddings to false in its config, save_pretrained to a new folder) and merge into that"
)


@dataclass(frozen=True)
class Change:
    """How a tensor is merged, in this order. rounded: to NF4 first; value: replaced by it; factors: changed by them;
    rows: these rows replaced; shift: this added. transposed: the tensor is stored as [in, out]."""

    factors: LoraFactors | None = None
    rounded: bool = False
    transposed: bool = False
    value: TensorInfo | None = None
    rows: Rows | None = None
    shift: Shift | None = None

    @property
    def own(self) -> bool:
        """Whether the adapter changes the tensor, and not only NF4."""
        return any(part is not None for part in (self.factors, self.value, self.rows, self.shift))


class Merged(Wrapped):
    """`base` with `adapter` merged in. changes: tensor → how it is merged; notes: what the user should know.

    trained_on: 'nf4' if the adapter was trained on an NF4 base: each weight that was in NF4 during training is rounded
    to NF4 and back before the adapter's change is added, because the change was learned against those values (Dettmers
    et al., 2023, section 3); 'base' adds it to the weights as they are; 'auto' follows the adapter's record, or 'base'
    if it has none. The weights of a base stored in NF4 are not rounded again.
    Sums are taken in float32 and rounded once to the dtype of the stored weight. The tokenizer is the adapter's own
    where it has one that fits. Raises LlmqError, naming the first weight, if the adapter does not fit the base.
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
        self.notes: list[str] = []
        self._retrained = False
        self.places = Places(base)
        self.changes = self._fit(record.get("nf4"))
        self.tokenizer = Carried(adapter.folder, base, self._vocabulary(), self._retrained)
        self.notes += self.tokenizer.notes

    def _fit(self, rounded: list[str] | None) -> dict[str, Change]:
        """Match the adapter's parameters to tensors. rounded: the modules that were in NF4, if recorded."""
        changes: dict[str, Change] = {}
        if self.trained_on == "nf4" and not isinstance(self.base, NF4Source):
            for module in sorted(quantizable(self.places.model) if rounded is None else rounded):
                place = self._place(f"{module}.weight")
                changes[place.tensor] = Change(rounded=True, transposed=stores_transposed(place.module))
        self._fit_values(changes)
        for module, factors in self.adapter.factors.items():
            place = self._place(f"{module}.weight")
            transposed = factors.embedding or stores_transposed(place.module)
            self._check(place, factors.shape[::-1] if transposed else factors.shape, module)
            if len(place.parameters) > 1:
                raise LlmqError(
                    f"{self._who(module)}, whose weight {place.tensor} is shared with another module{UNTIE}"
                )
            before = changes.get(place.tensor, Change())
            changes[place.tensor] = replace(before, factors=factors, transposed=transposed)
        for module, rows in self.adapter.rows.items():
            place = self._place(f"{module}.weight")
            count, width = self.base.info(place.tensor).shape
            self._check(place, (max(count, 1 + max(rows.ids, default=0)), rows.info.shape[1]), module)
            changes[place.tensor] = replace(changes.get(place.tensor, Change()), rows=rows)
        for module, shift in self.adapter.shifts.items():
            found = self.places.find(f"{module}.bias")
            if isinstance(found, str):
                raise LlmqError(
                    f"{self._who(module)}, which has no bias, so the one that was trained (lora_bias) has no place in "
                    "the merged model: PEFT cannot merge it either, train without lora_bias"
                )
            self._check(found, shift.info.shape, module)
            changes[found.tensor] = replace(changes.get(found.tensor, Change()), shift=shift)
        return changes

    def _fit_values(self, changes: dict[str, Change]) -> None:
        """Whole parameters: those that are equal to the base's are left out."""
        trained: dict[str, tuple[Place, set[str]]] = {}
        same = set[str]()
        for parameter, info in self.adapter.values.items():
            place = self._place(parameter)
            self._check(place, info.shape, parameter)
            stored, value = self.base.read(place.tensor), read_tensor(info)
            other = changes.get(place.tensor, Change()).value
            if other is not None and not torch.equal(value, read_tensor(other)):
                raise LlmqError(f"{self._who(parameter)}, and gives two values for {place.tensor}{UNTIE}")
            if torch.equal(value.to(stored.dtype), stored):
                same.add(place.tensor)
                continue
            if parameter in self.adapter.copies:
                self.notes.append(
                    f"the adapter's own copy of {parameter} differs from the base's and is used, as PEFT does: the "
                    "base may not be the one that it was trained on"
                )
            else:
                trained.setdefault(place.tensor, (place, set()))[1].add(parameter)
            self._retrained = self._retrained or self._is_vocabulary(place.module)
            changes[place.tensor] = replace(changes.get(place.tensor, Change()), value=info)
        for tensor, (place, names) in trained.items():
            alone = len(place.parameters) > len(names) and not self.adapter.config.get("ensure_weight_tying")
            if alone or tensor in same:
                raise LlmqError(f"{self._who(min(names))}, whose weight {tensor} is shared with another module{UNTIE}")

    def _who(self, name: str) -> str:
        return f"{self.adapter.folder} does not fit {self.folder}: it changes {name}"

    def _place(self, parameter: str) -> Place:
        """Where a parameter lies. Raises LlmqError."""
        found = self.places.find(parameter)
        if isinstance(found, str):
            raise LlmqError(f"{self._who(parameter.removesuffix('.weight'))}, {found}")
        return found

    def _check(self, place: Place, shape: tuple[int, ...], name: str) -> None:
        """Raise LlmqError if a change is not of the tensor's shape."""
        stored = self.base.info(place.tensor).shape
        if shape == stored:
            return
        resized = len(shape) == len(stored) and shape[1:] == stored[1:] and self._is_vocabulary(place.module)
        way = (
            f": the vocabulary was resized in training; resize the base's (resize_token_embeddings({shape[0]}), "
            "save_pretrained to a new folder, with the adapter's tokenizer) and merge into that"
            if resized
            else ""
        )
        turned = stores_transposed(place.module) and len(shape) == 2
        seen, wanted = (shape[::-1], stored[::-1]) if turned else (shape, stored)
        raise LlmqError(f"{self._who(name)} by {[*seen]}, and the weight is {[*wanted]}{way}")

    def _is_vocabulary(self, module: nn.Module | None) -> bool:
        """Whether a module is an input or output embedding of its model."""
        return module is not None and any(module is one for one in self.places.vocabularies())

    def _vocabulary(self) -> int | None:
        """Rows of the input embedding, None if the model does not say which it is."""
        modules = self.places.vocabularies()
        return int(modules[0].weight.shape[0]) if modules else None  # type: ignore[index]

    def exact(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The merged weight and the adapter's change of it (None if it has none), in float32, in the stored layout."""
        change = self.changes[name]
        weight = self.base.read(name)
        if change.rounded:
            value = weight.to(self.dtype or weight.dtype)
            value = through_nf4(value.t().contiguous() if change.transposed else value, self.double)
            weight = value.t() if change.transposed else value
        before = weight.float()
        if not change.own:
            return before, None
        value = before if change.value is None else read_tensor(change.value).to(weight.dtype).float()
        if change.factors is not None:
            value = change.factors.merged(value.t() if change.transposed else value)
            value = value.t().contiguous() if change.transposed else value
        if change.rows is not None:
            value = value.index_copy(0, torch.tensor(change.rows.ids), read_tensor(change.rows.info).float())
        if change.shift is not None:
            value = value + read_tensor(change.shift.info).float() * change.shift.scale
        return value, value - before

    def read(self, name: str) -> Tensor:
        """The tensor as merged, in the dtype that the base stores it in."""
        return self.exact(name)[0].to(self.info(name).dtype) if name in self.changes else self.base.read(name)

    def changes_tensor(self, name: str) -> bool:
        """See `Wrapped.changes_tensor`."""
        return name in self.changes

    def aux_files(self) -> dict[str, Path]:
        """See `Source.aux_files`: with the adapter's tokenizer where it is carried."""
        return self.tokenizer.replaced(self.base.aux_files())

    def fingerprint(self) -> str:
        """A hash of the base, the adapter and how they are merged."""
        rounded = sorted(name for name, change in self.changes.items() if change.rounded)
        parts = [self.base.fingerprint(), self.adapter.digest, str(self.dtype), self.double, rounded]
        parts += [self.tokenizer.digest] if self.tokenizer.files else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_base(folder: Path, trust_remote_code: bool = False) -> Source:
    """A base model: unquantized, or dequantized when read: published in FP8 or FP4, or in bitsandbytes' NF4.

    Raises LlmqError.
    """
    config = FolderSource(folder, trust_remote_code, quantized_ok=True).config
    if config.get("quantization_config") and not reads(folder, config):
        return NF4Source(folder, trust_remote_code)
    return open_source(folder, trust_remote_code)


def quantizable(model: nn.Module) -> list[str]:
    """The modules that transformers converts to NF4: linear layers except the output layer and tied ones."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(model))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or stores_transposed(m)]
    return [n for n in linear if n not in kept]


def stores_transposed(module: nn.Module | None) -> bool:
    """Whether a linear layer stores its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
