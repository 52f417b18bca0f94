"""An NF4 folder of bitsandbytes, read as a dense model; and rounding to NF4 by bitsandbytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import FolderSource, Wrapped
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.bitsandbytes.write import ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS, STATE
from llmq.machine import require

BLOCK = 64
"""The number of weights per scale in NF4, the only block size that QLoRA and transformers use."""
_STATE = STATE.removeprefix("weight")
_PARTS = tuple(name.removeprefix("weight") for name in (ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS, STATE))


class NF4Source(Wrapped):
    """A folder that bitsandbytes quantized to NF4, read as dequantized weights.

    A quantized weight has the dtype and shape that it had before quantization. Raises LlmqError if the folder is
    quantized by another method.
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
        """See `Source.names`: the weights, without scales and other tensors of quantization."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`: dtype and shape before quantization."""
        return self.quantized.get(name) or self.base.info(name)

    def changes_tensor(self, name: str) -> bool:
        """See `Wrapped.changes_tensor`."""
        return name in self.quantized

    def read(self, name: str) -> Tensor:
        """The tensor in its dtype before quantization; dequantized by bitsandbytes if it is quantized."""
        if name not in self.quantized:
            return self.base.read(name)
        bnb = require("bitsandbytes", "reading an NF4 model")
        stored = set(self.base.names())
        parts = {f"w{p}": self.base.read(name + p) for p in _PARTS if name + p in stored}
        state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        value: Tensor = bnb.functional.dequantize_4bit(self.base.read(name), state)
        return value


def is_nf4(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a model that bitsandbytes quantized to NF4."""
    section = config.get("quantization_config")
    return (
        isinstance(section, dict) and bool(section.get("load_in_4bit")) and section.get("bnb_4bit_quant_type") == "nf4"
    )


def through_nf4(weight: Tensor, double: bool) -> Tensor:
    """A weight [out, in] rounded to NF4 and back by bitsandbytes, in its dtype: the effective weight of an NF4 base."""
    functional = require("bitsandbytes", "merging a tune of an NF4 base").functional
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    value: Tensor = functional.dequantize_4bit(codes, state)
    return value
