"""Run standard checkpoints on llmq's kernels through stock from_pretrained, after a call of `use_kernels`.

Transformers looks up the reader of a quantization method in two tables; `use_kernels` replaces entries by llmq's
readers and restores them. A reader puts placeholders in the place of quantized weights, transformers fills them like
any module (devices, shards, names), and each is then packed for a kernel and its memory freed, one at a time.
Checkpoints that llmq does not support are loaded by stock transformers' own reader, with one line in the log.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq import formats
from llmq.errors import LlmqError
from llmq.formats.codebook import restored
from llmq.formats.plain import Weight, mapping
from llmq.formats.stacks import unmarked
from llmq.inference.experts import use_packed
from llmq.inference.find_experts import Stack
from llmq.inference.own import leave, own, own_layer
from llmq.inference.placeholders import Found, Placeholder, apart, find, inner, refuse_random
from llmq.inference.stack import packed_stack
from llmq.machine import give_back

log = logging.getLogger("llmq")

_stock: dict[str, tuple[Any, Any] | None] = {}
"""The original entries of transformers' two tables for each method; None if transformers does not know the method."""


def use_kernels(on: bool = True) -> None:
    """Make from_pretrained load compressed-tensors, GPTQ, AWQ, AQLM and bitsandbytes 4-bit folders on llmq's kernels.

    on: False restores transformers' tables. Repeated calls change nothing. Loaded models are not affected. Neither
    gptqmodel nor optimum is needed.
    """
    quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    if on and not _stock:
        for method, readers in formats.readers().items():
            _stock[method] = (quantizers[method], configs[method]) if method in quantizers else None
            quantizer, config = _stock[method] or (_Nobody, _Plain)
            quantizers[method] = partial(_quantizer, quantizer, readers)  # type: ignore[assignment]
            configs[method] = _Configuration(config)  # type: ignore[assignment]
    elif not on and _stock:
        for method, before in _stock.items():
            if before is None:
                del quantizers[method], configs[method]
            else:
                quantizers[method], configs[method] = before
        _stock.clear()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """`use_kernels` within the context; the previous state is restored afterwards."""
    before = bool(_stock)
    use_kernels()
    try:
        yield
    finally:
        use_kernels(before)


class _Plain(QuantizationConfigMixin):
    """The configuration of a method that transformers does not know: the values of config.json as attributes."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class _Nobody(HfQuantizer):
    """Placeholder for stock transformers' quantizer of a method that transformers does not know; never instantiated."""


class _Configuration:
    """Replaces transformers' configuration class, which it wraps; only `from_dict` is ever called."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def from_dict(self, values: dict[str, Any], **kwargs: Any) -> Any:
        """Transformers' configuration; keys that it would reject or lose are removed first and set on the result."""
        ours = restored(values)
        if ours is not None:
            return _Plain(**ours)
        values, alone = unmarked(values)
        own = {key: values.pop(key) for key in ("dynamic", "modules_in_block_to_quantize") if key in values}
        values, ordered = _without_order(values)
        # Checkpoints set "dequantize" because stock readers cannot run them packed (docs/design.md).
        dense = values.pop("dequantize", False)
        if mapping(values.get("transform_config"), "transform_config").get("config_groups"):
            raise LlmqError(
                "this checkpoint rotates activations while it runs (transform_config), which llmq does not support yet"
            )
        config = self.stock.from_dict(values, **kwargs)
        for key, value in (own | {"ordered": ordered, "dense": dense, "alone": alone}).items():
            if value:
                setattr(config, key, value)
        return config


def _without_order(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration without act-order by group, which newer compressed-tensors refuses; and which groups had it."""
    groups = mapping(values.get("config_groups"), "config_groups")
    changed = {}
    for name, group in groups.items():
        if isinstance(group, list):
            continue  # the key is a preset's name, the list its targets
        weights = mapping(mapping(group, f"config_groups.{name}").get("weights"), f"config_groups.{name}.weights")
        if _by_group(weights.get("actorder")):
            changed[name] = {**group, "weights": {**weights, "actorder": None}}
    return (values | {"config_groups": {**groups, **changed}} if changed else values), tuple(changed)


def _by_group(order: Any) -> bool:
    """Whether an `actorder` of any compressed-tensors version means that each input has its own group index (g_idx)."""
    return order is True or str(order).lower() in ("group", "dynamic")


def _quantizer(stock: Any, readers: tuple[Any, ...], config: Any, pre_quantized: bool = True, **kwargs: Any) -> Any:
    """The quantizer of one from_pretrained call: llmq's, or stock transformers' if llmq cannot read the checkpoint."""
    reasons = ["it is quantized while it is loaded"] if not pre_quantized else []
    for reader in readers if pre_quantized else ():
        reason = reader.refusal(config)
        if reason is None:
            return KernelQuantizer(config, reader(config), stock)
        reasons.append(reason)
    quantizer = _stock_quantizer(stock, config, reasons[0], pre_quantized, **kwargs)
    if pre_quantized and readers:
        _guard(quantizer, tuple({suffix for reader in readers for suffix in reader.suffixes}))
    return quantizer


def _guard(quantizer: Any, suffixes: tuple[str, ...]) -> None:
    """Make a stock quantizer refuse experts that transformers would fill with random numbers."""
    preprocess = quantizer.preprocess_model

    def checked(model: Any, *args: Any, **kwargs: Any) -> None:
        preprocess(model, *args, **kwargs)
        _refuse_random(quantizer, model, suffixes, kwargs.get("checkpoint_files"))

    quantizer.preprocess_model = checked


def _refuse_random(quantizer: Any, model: Any, suffixes: tuple[str, ...], files: Any) -> None:
    """See `refuse_random`; files that are not in safetensors are not looked at."""
    if files and all(str(file).endswith(".safetensors") for file in files):
        refuse_random(model, quantizer, suffixes, files)


def _stock_quantizer(stock: Any, config: Any, reason: str, pre_quantized: bool = True, **kwargs: Any) -> Any:
    """Stock transformers' own quantizer; the reason is logged in one line."""
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if getattr(config, "alone", False):
        raise LlmqError(f"{reason}, and only llmq's kernels run experts that are packed one by one from a stack")
    if stock is _Nobody:
        raise LlmqError(f"{method}: {reason}, and stock transformers does not know {method}")
    if getattr(config, "ordered", False):
        raise LlmqError(f"{method}: {reason}, and stock transformers does not support act-order by group")
    if getattr(config, "dense", False):
        config.dequantize = True
    log.warning("%s: stock transformers loads it: %s", method, reason)
    return stock(config, pre_quantized=pre_quantized, **kwargs)


class KernelQuantizer(HfQuantizer):
    """Loads a checkpoint's quantized weights packed, onto llmq's kernels."""

    requires_calibration = False

    def __init__(self, config: Any, reader: Any, stock: Any) -> None:
        super().__init__(config, pre_quantized=True)
        self.reader, self.stock = reader, stock
        self.placeholders: dict[str, Placeholder] = {}
        self.found = Found()
        self.originals: dict[str, Any] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises LlmqError if modules would be offloaded to the disk, or some of them to the CPU beside a GPU."""
        kinds = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
            raise LlmqError(
                f"packed weights are not moved while a model runs, but its device map has {', '.join(sorted(kinds))}: "
                "give devices that hold all of it, or device_map='cpu'"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Without a device map, use the default device of the method's stock quantizer."""
        return self.stock.update_device_map(self, device_map)

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Insert placeholders; if no kernel supports the files' weights, turn into the stock quantizer instead."""
        files = kwargs.get("checkpoint_files")
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            reason: str | None = "its weights are not in safetensors files"
        else:
            # preprocess_model would also do this, but too late for us; a second call does nothing.
            self._convert_model_for_quantization(model)
            found = find(model, self.reader, files)
            self.found, self.placeholders, reason = found, found.quantized, found.unserved
        if reason is None:
            # Tensors that are known and not needed: transformers would warn of each.
            aside = {rf"\.{suffix}$" for suffix in getattr(self.reader, "aside", ())}
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *aside}
            super().preprocess_model(model, dtype=dtype, **kwargs)
            return
        suffixes = self.reader.suffixes
        stock = _stock_quantizer(self.stock, self.quantization_config, reason)
        stock.validate_environment(device_map=kwargs.get("device_map"), weights_only=True)
        # from_pretrained keeps using this object, so it must become the stock quantizer itself.
        self.__class__, self.__dict__ = type(stock), stock.__dict__
        self.preprocess_model(model, dtype=dtype, **kwargs)
        _refuse_random(self, model, suffixes, files)

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Where transformers would make linear layers of a type's experts: not if they are named as in the model."""
        if not getattr(self.quantization_config, "alone", False):
            super()._convert_model_for_quantization(model)  # type: ignore[no-untyped-call]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, placeholder in self.placeholders.items():
            model.set_submodule(name, placeholder)
        for name, placeholder in self.found.dense.items():
            self.originals[name] = model.get_submodule(name)
            model.set_submodule(name, placeholder)
        for stack in self.found.stacks:
            path, _, name = stack.name.rpartition(".")
            owner = model.get_submodule(path)
            del owner._parameters[name]
            # Some models' initialization accesses it unconditionally.
            vars(owner)[name] = torch.empty(0, device="meta")
        for name, placeholder in self.found.experts.items():
            _put(model, name, placeholder)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Map stored names to those of buffers. transformers < 5.21 passes no model.

        Those with a dot in their suffix, and tensors of experts that transformers' rules would join as if they were
        dense weights.
        """
        from transformers.core_model_loading import WeightRenaming

        every = [*self.placeholders.values(), *self.found.dense.values(), *self.found.experts.values()]
        dotted = sorted({s for p in every for s in p.layer.entries if "." in s})
        renamed = [WeightRenaming(source_patterns=s.replace(".", r"\."), target_patterns=inner(s)) for s in dotted]
        # A search, as the base model's prefix may be missing in the files.
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for suffix in sorted({s for p in self.found.experts.values() for s in p.apart}):
            names = {n.removeprefix(prefix) for n, p in self.found.experts.items() if suffix in p.apart}
            places = "|".join(sorted({_any_expert(name) for name in names}))
            rule = rf"((?:{places}))\.{re.escape(inner(suffix))}$"
            renamed.append(WeightRenaming(source_patterns=rule, target_patterns=rf"\1.{apart(suffix)}"))
        return weight_conversions + renamed

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from accelerate.hooks import add_hook_to_module

        self._pack_stacks(model)
        self._make_dense(model)
        plain: dict[str, list[str]] = {}
        for name in list(self.placeholders):
            placeholder = self.placeholders.pop(name)
            layer = placeholder.replacement(model.dtype)
            model.set_submodule(name, layer)
            own_layer(layer)
            leave(placeholder.buffers())
            if hasattr(placeholder, "_hf_hook"):
                add_hook_to_module(layer, placeholder._hf_hook)
            if layer.notes:
                plain.setdefault("; ".join(f"{k}: {v}" for k, v in layer.notes.items()), []).append(name)
        for reason, names in plain.items():
            log.warning("%d weights run on the plain operator, such as %s: %s", len(names), names[0], reason)
        own(model)
        give_back()
        return model

    def _pack_stacks(self, model: Any) -> None:
        """Put packed stacks in the place of experts' parameters, and free the placeholders of their experts."""
        owners = {}
        for stack in self.found.stacks:

            def weights(stack: Stack = stack) -> Iterator[list[Weight]]:
                for parts in stack.experts:
                    yield [self.found.experts[part.place].weight_read() for part in parts]
                    for part in parts:
                        leave(self.found.experts[part.place].buffers())
                        del self.found.experts[part.place]
                        _take_out(model, part.place)

            first = self.found.experts[stack.experts[0][0].place]
            packed = packed_stack(stack.name, stack.shape, stack.transposed, weights(), model.dtype, first.file)
            path, _, name = stack.name.rpartition(".")
            owners[path] = owner = model.get_submodule(path)
            del vars(owner)[name]
            owner.register_module(name, packed)
        for owner in owners.values():
            use_packed(owner)

    def _make_dense(self, model: Any) -> None:
        """Restore the modules that need their weights' values, with these."""
        from accelerate.hooks import add_hook_to_module

        for name, module in self.originals.items():
            placeholder = self.found.dense.pop(name)
            layer = placeholder.replacement(model.dtype)
            module.weight, module.bias = nn.Parameter(layer.dense(), requires_grad=False), None
            if layer.bias is not None:
                module.bias = nn.Parameter(layer.bias, requires_grad=False)
            model.set_submodule(name, module)
            if hasattr(placeholder, "_hf_hook"):
                add_hook_to_module(module, placeholder._hf_hook)
        if self.originals:
            log.warning(
                "%d weights are dense, such as %s: its %s is no plain linear layer",
                len(self.originals), *next((n, type(m).__name__) for n, m in self.originals.items()),
            )  # fmt: skip
        self.originals.clear()

    def is_serializable(self) -> bool:
        """No: the weights in memory are packed for one device."""
        log.error(
            "a model on llmq's kernels is packed for its device and cannot be saved: copy the folder it was loaded from"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on the model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes: torch.compile sees one operator per layer."""
        return True


def _any_expert(name: str) -> str:
    """A regular expression for the names that differ from this one in their last number."""
    return re.sub(r"(.*\\\.)\d+(\\\..*)", r"\1\\d+\2", re.escape(name))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Make a module a model's submodule, with the modules above it that the model lacks."""
    above, at = name.split("."), model
    for step in above[:-1]:
        if step not in at._modules:
            at.register_module(step, nn.Module())
        at = at.get_submodule(step)
    at.register_module(above[-1], module)


def _take_out(model: nn.Module, name: str) -> None:
    """Undo `_put`: remove a submodule, and those above it that have become empty."""
    while name:
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        del owner._modules[last]
        if type(owner) is not nn.Module or owner._modules:
            return
        name = path
