"""Codebooks of a loaded model as 8-bit integers: faster on a CPU, at twice the memory, for slightly other weights."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from llmq.formats.plain import IntWeight
from llmq.inference.layer import QuantLinear
from llmq.inference.linear import CodebookLinear, IntLinear, LevelsLinear
from llmq.inference.stack import StackedLinear
from llmq_kernels import rounded
from llmq_kernels.int_linear import int8pack
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels

log = logging.getLogger(__name__)


def round_codebooks(model: nn.Module) -> int:
    """Replace the layers of 4-bit codebooks that are on a CPU, where torch's 8-bit operator takes them. Returns how
    many; what stays as it is, is logged.
    """
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, CodebookLinear | LevelsLinear)]
    stacks = (part.at(0) for part in model.modules() if isinstance(part, StackedLinear))
    experts = sum(isinstance(layer, CodebookLinear | LevelsLinear) for layer in stacks)
    count = 0
    for name, layer in found:
        weight = _rounded(layer)
        if weight is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, weight)
            count += 1
    if left := len(found) - count:
        log.warning(
            "%d of %d weights stay codebooks: int8 is for a CPU, bfloat16 and widths of whole blocks", left, len(found)
        )
    if experts:
        log.warning("%d stacks of experts stay codebooks: int8 is for other weights", experts)
    return count


def _rounded(layer: QuantLinear) -> IntLinear | None:
    """The layer with integers, or None if it has no faster operator."""
    out, width, held = layer.out_features, layer.in_features, layer._buffers
    block = layer.block_size if isinstance(layer, CodebookLinear) else width
    if width % block or layer.layout == "planes":
        return None
    if int8pack.refusal(layer.qweight.device, layer.dtype, 8, out, width, block) is not None:
        return None
    tensors: Any = held
    if isinstance(layer, CodebookLinear):
        nested = tensors["nested_absmax"], tensors["nested_codebook"], layer.offset
        stored = PackedCodebook(layer.qweight, layer.absmax, layer.codebook, *nested, out, width, block)
        plain: PackedInt = rounded.of_blocks(stored)
    else:
        plain = rounded.of_levels(PackedLevels(layer.qweight, tensors["levels"], out, width))
    weight = IntWeight(plain.packed, plain.scale, None, 8, width, plain.group_size)
    made = IntLinear(weight, layer.bias, layer.dtype)
    made.train(layer.training)
    return made
