"""Standard checkpoints on llmq's kernels: `use_kernels`, after which stock from_pretrained runs them.

Transformers looks up the reader of a quantization method in two tables; `use_kernels` puts its own readers there and
takes them out again. A reader puts placeholders where the files have quantized weights, transformers fills them as
it fills anything else (devices, shards, names), and each is then packed for a kernel and gives its memory back, one at
a time. What is not served goes to the reader that stock transformers has, with one line in the log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq import formats
from llmq.errors import LlmqError
from llmq.formats.plain import mapping
from llmq.inference.linear import QuantLinear
from llmq.inference.placeholders import Placeholder, find, inner
from llmq.machine import give_back

log = logging.getLogger("llmq")

_stock: dict[str, tuple[Any, Any] | None] = {}
"""What transformers' two tables had for each method before ours; None where it does not know the method."""


def use_kernels(on: bool = True) -> None:
    """From now on, from_pretrained of compressed-tensors, GPTQ, AWQ and bitsandbytes 4-bit folders runs on kernels.

    on: False undoes it: the tables of transformers are as they were. Twice is once. Models that are loaded stay as they
    are. Neither gptqmodel nor optimum is needed.
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
    """`use_kernels` for the time of a block, and as it was before afterwards."""
    before = bool(_stock)
    use_kernels()
    try:
        yield
    finally:
        use_kernels(before)


class _Plain(QuantizationConfigMixin):
    """The configuration of a method that transformers does not know: what config.json says, as attributes."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class _Nobody(HfQuantizer):
    """In the place of stock transformers' quantizer for a method that it does not know; never made."""


class _Configuration:
    """In the place of transformers' own configuration class, which it makes: only `from_dict` is ever called."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def from_dict(self, values: dict[str, Any], **kwargs: Any) -> Any:
        """Transformers' configuration, without what only its own readers need, and with what it would forget."""
        values = dict(values)
        own = {key: values.pop(key) for key in ("dynamic", "modules_in_block_to_quantize") if key in values}
        values, ordered = _without_order(values)
        # A checkpoint's wish to be made dense is there because stock readers cannot run it packed (docs/design.md).
        dense = values.pop("dequantize", False)
        if mapping(values.get("transform_config"), "transform_config").get("config_groups"):
            raise LlmqError("this checkpoint rotates activations while it runs (transform_config): llmq cannot yet")
        config = self.stock.from_dict(values, **kwargs)
        for key, value in (own | {"ordered": ordered, "dense": dense}).items():
            if value:
                setattr(config, key, value)
        return config


def _without_order(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration without activation order by group, which newer compressed-tensors refuses; and who had it."""
    groups = mapping(values.get("config_groups"), "config_groups")
    changed = {}
    for name, group in groups.items():
        if isinstance(group, list):
            continue  # the name is a preset's, and these are its targets
        weights = mapping(mapping(group, f"config_groups.{name}").get("weights"), f"config_groups.{name}.weights")
        if _by_group(weights.get("actorder")):
            changed[name] = {**group, "weights": {**weights, "actorder": None}}
    return (values | {"config_groups": {**groups, **changed}} if changed else values), tuple(changed)


def _by_group(order: Any) -> bool:
    """Whether compressed-tensors means, or meant, that every input has a group of its own."""
    return order is True or str(order).lower() in ("group", "dynamic")


def _quantizer(stock: Any, readers: tuple[Any, ...], config: Any, pre_quantized: bool = True, **kwargs: Any) -> Any:
    """The quantizer of one from_pretrained: ours, or stock transformers' own where nobody here reads the checkpoint."""
    reasons = ["it is quantized while it is loaded"] if not pre_quantized else []
    for reader in readers if pre_quantized else ():
        reason = reader.refusal(config)
        if reason is None:
            return KernelQuantizer(config, reader(config), stock)
        reasons.append(reason)
    return _stock_quantizer(stock, config, reasons[0], pre_quantized, **kwargs)


def _stock_quantizer(stock: Any, config: Any, reason: str, pre_quantized: bool = True, **kwargs: Any) -> Any:
    """Stock transformers' own quantizer, with one line that says why."""
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if stock is _Nobody:
        raise LlmqError(f"{method}: {reason}, and stock transformers does not know {method}")
    if getattr(config, "ordered", False):
        raise LlmqError(f"{method}: {reason}, and stock transformers does not know activation order by group")
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

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises LlmqError where modules would be sent to the disk, or some of them to the CPU beside a GPU."""
        kinds = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
            raise LlmqError(
                f"packed weights are not moved while a model runs, but its device map has {', '.join(sorted(kinds))}: "
                "give devices that hold all of it, or device_map='cpu'"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Where nothing is said, each method has its own device in stock transformers; so it has here."""
        return self.stock.update_device_map(self, device_map)

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Puts placeholders in; where the files hold what no kernel serves, becomes the stock quantizer instead."""
        files = kwargs.get("checkpoint_files")
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            reason: str | None = "its weights are not in safetensors files"
        else:
            # Twice does nothing: preprocess_model does it too, but after the files have been looked at.
            self._convert_model_for_quantization(model)  # type: ignore[no-untyped-call]
            found = find(model, self.reader, files)
            self.placeholders, reason = found.quantized, found.unserved
        if reason is None:
            super().preprocess_model(model, dtype=dtype, **kwargs)
            return
        stock = _stock_quantizer(self.stock, self.quantization_config, reason)
        stock.validate_environment(device_map=kwargs.get("device_map"), weights_only=True)
        # from_pretrained goes on with this very object, so it must turn into the other.
        self.__class__, self.__dict__ = type(stock), stock.__dict__
        self.preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, placeholder in self.placeholders.items():
            model.set_submodule(name, placeholder)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Stored names with a dot in their suffix go to buffers without one. transformers < 5.21 gives no model."""
        from transformers.core_model_loading import WeightRenaming

        dotted = sorted({s for p in self.placeholders.values() for s in p.layer.entries if "." in s})
        return weight_conversions + [
            WeightRenaming(source_patterns=s.replace(".", r"\."), target_patterns=inner(s)) for s in dotted
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from accelerate.hooks import add_hook_to_module

        plain: dict[str, list[str]] = {}
        for name in list(self.placeholders):
            placeholder = self.placeholders.pop(name)
            layer = placeholder.replacement(model.dtype)
            model.set_submodule(name, layer)
            if hasattr(placeholder, "_hf_hook"):
                add_hook_to_module(layer, placeholder._hf_hook)
            if layer.notes:
                plain.setdefault("; ".join(f"{k}: {v}" for k, v in layer.notes.items()), []).append(name)
        for reason, names in plain.items():
            log.warning("%d weights run on the plain operator, such as %s: %s", len(names), names[0], reason)
        _own(model)
        give_back()
        return model

    def is_serializable(self) -> bool:
        """No: what is in memory is packed for a device."""
        log.error(
            "a model on llmq's kernels is packed for its device and not saved: copy the folder it was loaded from"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile sees one operator per layer."""
        return True


def _own(model: Any) -> None:
    """Copies, one at a time, what may still lie in a mapped file: one small tensor there keeps its pages resident."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            fresh = module.fresh()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type == "cpu" and not any(buffer is part for part in fresh):
                    # A new tensor: a view would hold on to what it is a view of, whatever its data are.
                    module._buffers[name] = buffer.clone()
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
