"""bitsandbytes weights of 4 or 8 bits, as `llmq inspect` shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import SMALL, Row, Unclear, dtype_name

COMPANIONS = {
    "weight": (
        "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
    )
}  # fmt: skip
"""Suffixes of the other tensors that belong to a weight, besides its codes."""
SCALES = ("SCB", "weight.absmax")


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of the tensors that store it, and its 4-bit state.

    Raises Unclear if these do not fit together, LlmqError if the state is damaged.
    """
    name, nbytes = f"{module}.weight", sum(part.nbytes for part in parts.values())
    weight = parts["weight"]
    if "SCB" in parts:
        if weight.dtype != torch.int8 or parts["SCB"].shape != weight.shape[:1]:
            raise Unclear(f"{dtype_name(weight.dtype)} {[*weight.shape]} with SCB {[*parts['SCB'].shape]}")
        return Row(name, weight.shape, "int", 8, 0, True, None, nbytes, dtype_name(weight.dtype))
    for ending, part in parts.items():
        if "quant_state" in ending and part.nbytes < SMALL:
            try:
                state = json.loads(bytes(source.read(part.name).tolist()))
                shape = tuple(int(size) for size in state["shape"])
                kind, group = str(state["quant_type"]), int(state["blocksize"])
            except (ValueError, KeyError, TypeError) as error:
                raise LlmqError(f"{part.file}: {part.name} is damaged ({error}); download it again") from error
            size, blocks = math.prod(shape), math.prod(parts["weight.absmax"].shape)
            if group < 1 or weight.nbytes != -(-size // 2) or blocks != -(-size // group):
                raise Unclear(f"its state says {[*shape]} in blocks of {group}, its tensors have another size")
            return Row(name, shape, kind, 4, group, True, None, nbytes, dtype_name(weight.dtype))
    raise Unclear("4-bit codes without the state that says their shape")
