"""Placeholders for a checkpoint's quantized weights in a model on the meta device, found by the headers of its files.

Transformers decides by the configuration alone which modules are quantized, and fills missing tensors with random
numbers. Here the files decide, the configuration must agree, and everything is checked before any data is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.tensors import TensorInfo, read_header
from llmq.discovery.rename import Rules
from llmq.errors import LlmqError
from llmq.formats.plain import FLOATS, Entry, Layer, Reader, Weight
from llmq.inference.find_experts import ORDINARY, Joining, Stack, layer_of, unknown
from llmq.inference.layer import QuantLinear
from llmq.inference.linear import quant_linear

BIAS = "bias"
Stored = dict[str, TensorInfo]


class Placeholder(nn.Module):
    """A module that receives a weight's stored tensors, each in a buffer of its own, and can only be replaced.

    name: of the module; shape: of its weight, [out, in]; stored: its tensors in the files, by suffix, with all that
    `layer` needs; apart: those that transformers would join to others, if their buffers were named like them.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        layer: Layer,
        stored: Mapping[str, TensorInfo],
        bias: bool,
        apart: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.name, self.layer, self.apart = name, layer, apart
        # Some models' initialization reads them.
        self.out_features, self.in_features = shape
        self.file = stored[next(iter(layer.entries))].file
        for suffix in (*layer.entries, *((BIAS,) if bias else ())):
            info = stored[suffix]
            self.register_buffer(self._buffer(suffix), torch.empty(info.shape, dtype=info.dtype, device="meta"))
        if "bias" not in self._buffers:
            self.bias = None
        if "weight" not in self._buffers:
            # Some models' initialization accesses `weight` unconditionally; on the meta device it takes no memory.
            self.weight = torch.empty(1, 1, device="meta")

    def replacement(self, dtype: torch.dtype) -> QuantLinear:
        """The layer for the loaded tensors. Raises LlmqError if one was not loaded, or they contradict each other."""
        weight = self.weight_read()
        bias = self._loaded(BIAS) if "bias" in self._buffers else None
        try:
            return quant_linear(weight, bias, dtype)
        except (LlmqError, ValueError, TypeError) as error:
            raise LlmqError(f"{self.file}: {self.name}: {error}") from error

    def weight_read(self) -> Weight:
        """The weight of the loaded tensors. Raises LlmqError if one was not loaded, or they contradict each other."""
        tensors = {suffix: self._loaded(suffix) for suffix in self.layer.entries}
        try:
            return self.layer.read(tensors)
        except (LlmqError, ValueError, TypeError) as error:
            raise LlmqError(f"{self.file}: {self.name}: {error}") from error

    def _loaded(self, suffix: str) -> Tensor:
        tensor = self._buffers[self._buffer(suffix)]
        if tensor is None or tensor.device.type == "meta" or not getattr(tensor, "_is_hf_initialized", False):
            raise LlmqError(
                f"{self.file}: {self.name}.{suffix} was not loaded, although the file has it: please report this"
            )
        return tensor

    def _buffer(self, suffix: str) -> str:
        return apart(suffix) if suffix in self.apart else inner(suffix)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Never called in a loaded model: the placeholder is replaced once its tensors are loaded."""
        raise LlmqError(f"{self.name} has not been packed yet")


def inner(suffix: str) -> str:
    """The name of the buffer for a stored tensor; buffer names cannot have dots."""
    return suffix.replace(".", "__")


def apart(suffix: str) -> str:
    """The name of the buffer for a stored tensor that no rule of transformers matches."""
    return f"stored_{inner(suffix)}"


@dataclass
class Found:
    """quantized: module → placeholder; dense: the same for modules that compute something else of their weight than
    its product, and so need its values; stacks: the parameters whose experts are packed, their placeholders by place;
    unserved: why the kernels cannot run this checkpoint, or None."""

    quantized: dict[str, Placeholder] = field(default_factory=dict)
    dense: dict[str, Placeholder] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)
    experts: dict[str, Placeholder] = field(default_factory=dict)
    unserved: str | None = None


def find(model: nn.Module, reader: Reader, files: Iterable[str | Path]) -> Found:
    """The placeholders of a model on the meta device, for the weights that are quantized in these files.

    Raises LlmqError, naming file and tensor, if a tensor is missing or its shape or dtype contradicts the
    configuration, a linear module of the base model or a parameter of experts has no tensor at all, or a file is
    damaged.
    """
    headers = [read_header(Path(file)) for file in files]
    stored = grouped(headers, reader.suffixes)
    rules = Rules(model)
    modules, state = dict(model.named_modules()), model.state_dict()
    linear = {name: module for name, module in modules.items() if sizes(module) is not None}
    found, joining = Found(), Joining(model, rules)
    seen: set[str] = set()
    there: set[str] = set()
    for stem, tensors in stored.items():
        target, pattern = rules.rename(f"{stem}.weight")
        if pattern is None and joining.own(stem):
            continue
        there.add(target)
        name = target.removesuffix(".weight")
        module = linear.get(name)
        other = modules.get(name) if module is None and pattern is None else None
        if isinstance(other, nn.Linear) and isinstance(getattr(other, "weight", None), nn.Parameter):
            module = other
        if pattern is not None and target in state:
            filled = rules.filled(f"{stem}.weight")
            if filled != {target} and set(tensors) <= ORDINARY:
                seen |= {one.removesuffix(".weight") for one in filled}
                there |= filled
                continue
            joining.add(stem, target, pattern)
            continue
        if pattern is not None or module is None:
            owner = _inside_parameters(name, modules)
            there_too = target in state or name in modules or owner is not None
            if set(tensors) <= ORDINARY or not (there_too or (pattern and not _beside(name, modules))):
                continue
            if owner is not None and any(p.dim() >= 3 for p in modules[owner].parameters(recurse=False)):
                if not joining.foreign(stem):
                    raise LlmqError(unknown(tensors, owner, model))
            elif found.unserved is None:
                first = next(iter(tensors.values())).name
                found.unserved = f"{first} is part of {name}, which is no linear module"
            continue
        shape = sizes(module) or (module.weight.shape[0], module.weight.shape[1])
        layer = layer_of((name, stem), module, shape, tensors, reader)
        if layer is not None or "weight" in tensors:
            seen.add(name)
        elif set(tensors) != {BIAS}:
            info = next(iter(tensors.values()))
            raise LlmqError(
                f"{info.file}: {stem} has {', '.join(tensors)}, but no weight, packed or not; "
                "download or write the checkpoint again"
            )
        if layer is None:
            continue
        bias = module.bias is not None
        entries = dict(layer.entries) | ({BIAS: Entry(FLOATS, (shape[0],))} if bias else {})
        check(stem, shape, entries, tensors)
        where = found.quantized if name in linear else found.dense
        where[name] = Placeholder(name, shape, layer, tensors, bias)
    if found.unserved is not None:
        joining.refuse_foreign(stored)
    else:
        found.stacks, found.unserved = joining.stacks(stored, reader)
    for part in (part for stack in found.stacks for expert in stack.experts for part in expert):
        check(part.stem, part.shape, part.layer.entries, stored[part.stem])
        found.experts[part.place] = Placeholder(
            part.place, part.shape, part.layer, stored[part.stem], False, part.apart
        )
    if found.unserved is None:
        file = next(iter(next(iter(stored.values())).values())).file if stored else None
        rest = (n for header in headers for n in header if not n.endswith(tuple(f".{s}" for s in reader.suffixes)))
        renamed = {target for name in rest for target in rules.filled(name)}
        _check_complete(model, linear, seen | {name.removesuffix(".weight") for name in renamed}, file)
        there |= renamed | joining.joined.keys() | joining.stacked.keys()
        _check_experts(modules, {stack.name.rpartition(".")[0] for stack in found.stacks}, there, file)
    return found


def refuse_random(model: nn.Module, quantizer: Any, suffixes: tuple[str, ...], files: Iterable[str | Path]) -> None:
    """Raises LlmqError, naming file and tensor, if transformers would fill experts with random numbers.

    model: on the meta device, as the quantizer has prepared it; quantizer: of stock transformers, whose rules are asked
    where each packed tensor goes; suffixes: of the tensors that store a weight.
    """
    rules, modules, state = Rules(model, quantizer), dict(model.named_modules()), model.state_dict()
    for stem, tensors in grouped((read_header(Path(file)) for file in files), suffixes).items():
        packed = set(tensors) - ORDINARY
        if not packed or any(rules.rename(f"{stem}.{suffix}")[0] in state for suffix in packed):
            continue
        name = rules.only_renamed(stem)
        owner = None if name in modules else _inside_parameters(rules.place(f"{stem}.weight"), modules)
        if owner is not None and any(p.dim() >= 3 for p in modules[owner].parameters(recurse=False)):
            raise LlmqError(unknown(tensors, owner, model))


def _inside_parameters(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module with its own parameters, as fused experts have, in which a module that the model lacks would be."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name if name and any(True for _ in modules[name].parameters(recurse=False)) else None
    return None


def _beside(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module would be in a part that the model does not have: of its own, or one more entry of a list."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return not name or isinstance(modules[name], nn.ModuleList)


def grouped(headers: Iterable[Mapping[str, TensorInfo]], suffixes: tuple[str, ...]) -> dict[str, Stored]:
    """Module → its tensors in the files, by suffix; of several matching suffixes the longest is used."""
    ordered = sorted(suffixes, key=len, reverse=True)
    stored: dict[str, Stored] = {}
    for header in headers:
        for name, info in header.items():
            suffix = next((s for s in ordered if name.endswith(f".{s}")), None)
            if suffix is not None:
                stored.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = info
    return stored


def check(stem: str, shape: tuple[int, int], entries: Mapping[str, Entry], stored: Mapping[str, TensorInfo]) -> None:
    """Raises LlmqError unless every required tensor is stored with the right dtype and shape."""
    for suffix, entry in entries.items():
        info = stored.get(suffix)
        if info is None:
            file = next(iter(stored.values())).file
            raise LlmqError(
                f"{file}: {stem}.{suffix} is missing: a quantized weight {[*shape]} as config.json describes it has "
                f"{entry} there; download or write the checkpoint again"
            )
        if info.dtype not in entry.dtypes or info.shape != entry.shape:
            raise LlmqError(
                f"{info.file}: {info.name} must be {entry} for a weight {[*shape]} as config.json describes it, "
                f"not {str(info.dtype).removeprefix('torch.')} {[*info.shape]}"
            )


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """[out, in] of a linear module: torch's own or transformers' Conv1D, which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if type(module) is Conv1D:
        width, rows = module.weight.shape
        return rows, width
    return None


def _check_complete(model: nn.Module, linear: Mapping[str, nn.Module], seen: set[str], file: Path | None) -> None:
    """Raises LlmqError if a linear module of the base model has no tensors and is not tied to one that has."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in linear:
        if name.startswith(inside) and name not in seen and f"{name}.weight" not in tied:
            raise LlmqError(
                f"{file}: no tensor of {name}, which the model needs: transformers would fill it with random numbers; "
                "download or write the checkpoint again"
            )


def _check_experts(modules: Mapping[str, nn.Module], packed: set[str], there: set[str], file: Path | None) -> None:
    """Raises LlmqError if a parameter of experts is not there. packed: modules of which some experts are packed.

    Other modules of these classes are experts, too.
    """
    classes = {type(modules[name]) for name in packed}
    for name, module in modules.items():
        if type(module) in classes:
            for parameter, _ in module.named_parameters(recurse=False):
                if f"{name}.{parameter}" not in there:
                    raise LlmqError(
                        f"{file}: no tensor of {name}.{parameter}, which the model needs: transformers would fill it "
                        "with random numbers; download or write the checkpoint again"
                    )
