"""Each kind of packed weight as a linear layer (`layer.QuantLinear`); transformers_hook.py makes it from a checkpoint's
tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401  (registers the operators)
from llmq.formats.plain import (
    CodebookWeight,
    Float8Weight,
    Int8Weight,
    IntWeight,
    LevelsWeight,
    VectorsWeight,
    Weight,
)
from llmq.inference.layer import HALF, QuantLinear
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.float8_linear import scaled
from llmq_kernels.int_linear import layouts, planes
from llmq_kernels.int_linear.operator import planes_linear
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels


class IntLinear(QuantLinear):
    """Integer codes with a scale per group, in one of the layouts of llmq_kernels."""

    scale: Tensor
    zero: Tensor | None
    order: Tensor | None

    def __init__(self, weight: IntWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.words.shape[0], weight.in_features, bias, dtype)
        self.bits, self.group_size = weight.bits, weight.group_size
        self._held: PackedInt | None = None
        self.register_buffer("order", weight.order)
        self._pack(weight.words, weight.scale, weight.zero)

    def _pack(self, words: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Pack the plain form of the weight in the best layout for its device."""
        self.layout, reasons = layouts.choose(words.device, self.dtype, *self.sizes())
        self.notes = reasons if self.layout == layouts.DENSE_BITS else {}
        packed = layouts.pack(self.layout, words, scale, zero, self.bits, self.in_features, self.group_size, self.dtype)
        for name, part in zip(("qweight", "scale", "zero"), packed, strict=True):
            self.register_buffer(name, part)

    def product(self, x: Tensor) -> Tensor:
        """See QuantLinear."""
        x = x if self.order is None else x.index_select(-1, self.order)
        if self.layout == "planes" and planes.direct(x, self.bias):
            return planes_linear(x, self._packed(), self.bias)
        y: Tensor = torch.ops.llmq.int_linear(
            x, self.qweight, self.scale, self.zero, self.bias, *self.sizes(), self.layout
        )
        return y

    def _packed(self) -> PackedInt:
        """The weight as one value, made again when a buffer was replaced."""
        buffers, held = self._buffers, self._held
        packed, scale = buffers["qweight"], buffers["scale"]
        if held is None or held.packed is not packed or held.scale is not scale or held.zero is not buffers["zero"]:
            held = self._held = PackedInt(self.qweight, self.scale, self.zero, *self.sizes())
        return held

    def moved(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See QuantLinear."""
        if self.layout == layouts.DENSE_BITS:
            return None
        # The layout "planes" is the same for both dtypes that its kernels support.
        if self.layout == "planes" and device.type == self.qweight.device.type and {dtype, self.dtype} <= HALF:
            return None
        return f"its weight is packed as {self.layout} for {self.dtype}"

    def settle(self) -> None:
        """The plain form can be packed again on any device."""
        if self.layout == layouts.DENSE_BITS:
            self._pack(self.qweight, self.scale, self.zero)

    def fresh(self) -> list[Tensor]:
        """See QuantLinear."""
        return [] if self.layout == layouts.DENSE_BITS else [self.qweight]

    def extra_repr(self) -> str:
        """The text that print shows."""
        kind = "symmetric" if self.zero is None else "asymmetric"
        order = "" if self.order is None else ", inputs reordered"
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group_size}, {kind}{order}"

    def sizes(self) -> tuple[int, int, int, int]:
        """Bits, outputs, inputs and group size, as the operators take them."""
        return self.bits, self.out_features, self.in_features, self.group_size


class CodebookLinear(QuantLinear):
    """bitsandbytes' NF4 or FP4 weights in their stored form."""

    layout = "blocks"
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None

    def __init__(self, weight: CodebookWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.out_features, weight.in_features, bias, dtype)
        self.offset, self.block_size = weight.offset, weight.block_size
        self.nested = weight.nested_absmax is not None
        self.register_buffer("qweight", weight.packed)
        for name in ("absmax", "codebook", "nested_absmax", "nested_codebook"):
            self.register_buffer(name, getattr(weight, name))
        self.settle()

    def settle(self) -> None:
        """On a GPU, stored blocks become what the kernels of integers read, where blocks divide rows."""
        super().settle()
        device = self.qweight.device
        if self.layout == "blocks" and codebooks.usable(device, self.dtype, self.in_features, self.block_size):
            self.look_up()
        elif self.layout == "blocks" and device.type not in ("cpu", "meta") and self.in_features % self.block_size:
            why = f"blocks of {self.block_size} do not divide rows of {self.in_features}: plain torch runs it"
            self.notes = {"planes": why} | self.notes

    def look_up(self) -> None:
        """Pack for the kernels of integers, which look codes up."""
        nested = self.nested_absmax, self.nested_codebook, self.offset
        sizes = self.out_features, self.in_features, self.block_size
        hold(self, codebooks.of_blocks(PackedCodebook(self.qweight, self.absmax, self.codebook, *nested, *sizes)))
        for name in ("absmax", "nested_absmax", "nested_codebook"):
            del self._buffers[name]

    def moved(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See QuantLinear."""
        return held_back(self, device, dtype)

    def fresh(self) -> list[Tensor]:
        """See QuantLinear."""
        return [self.qweight] if self.layout == "planes" else []

    def product(self, x: Tensor) -> Tensor:
        """See QuantLinear."""
        if self.layout == "planes":
            return look_up(self, x)
        weight = (self.qweight, self.absmax, self.codebook, self.nested_absmax, self.nested_codebook, self.offset)
        y: Tensor = torch.ops.llmq.nf4_linear(
            x, *weight, self.bias, self.out_features, self.in_features, self.block_size
        )
        return y

    def extra_repr(self) -> str:
        """The text that print shows."""
        double = ", double-quantized" if self.nested else ""
        return f"{super().extra_repr()}, bits=4, group={self.block_size}{double}"


class _RoundedLinear(QuantLinear):
    """Codes with a scale for each row, whose inputs are rounded, per token or with a stored scale."""

    layout = "rows"
    scale: Tensor
    input_scale: Tensor | None

    def __init__(self, weight: Int8Weight | Float8Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.codes.shape[0], weight.codes.shape[1], bias, dtype)
        self.register_buffer("qweight", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("input_scale", weight.input_scale)
        self.settle()


class Int8Linear(_RoundedLinear):
    """int8 weights whose inputs are rounded to int8, per token or with a stored scale."""

    def product(self, x: Tensor) -> Tensor:
        """See QuantLinear."""
        y: Tensor = torch.ops.llmq.int8_linear(x, self.qweight, self.scale, self.input_scale, self.bias)
        return y

    def extra_repr(self) -> str:
        """The text that print shows."""
        return f"{super().extra_repr()}, bits=8, {'dynamic' if self.input_scale is None else 'static'} activations"


class Float8Linear(_RoundedLinear):
    """float8 weights whose inputs are rounded to float8, per token or with a stored scale."""

    def product(self, x: Tensor) -> Tensor:
        """See QuantLinear."""
        y: Tensor = torch.ops.llmq.float8_linear(x, self.qweight, self.scale, self.input_scale, self.bias)
        return y

    def settle(self) -> None:
        """On a GPU, scales are as its product takes them, and what torch multiplies there is found out."""
        super().settle()
        device = self.qweight.device
        if device.type in ("cpu", "meta") or self.notes:
            return
        self.scale = self.scale.to(torch.float32)
        reason = scaled.refusal(device, self.dtype, self.out_features, self.in_features)
        self.notes = {} if reason is None else {"float8": reason}

    def extra_repr(self) -> str:
        """The text that print shows."""
        return f"{super().extra_repr()}, float8, {'dynamic' if self.input_scale is None else 'static'} activations"


class LevelsLinear(QuantLinear):
    """4-bit codes with a codebook for each row."""

    layout = "rows"
    levels: Tensor

    def __init__(self, weight: LevelsWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.words.shape[0], weight.in_features, bias, dtype)
        packed, levels = weight.packed()
        self.register_buffer("qweight", packed)
        self.register_buffer("levels", levels)
        self.bits = weight.bits
        self.settle()

    def product(self, x: Tensor) -> Tensor:
        """See QuantLinear."""
        if self.layout == "planes":
            return look_up(self, x)
        y: Tensor = torch.ops.llmq.levels_linear(
            x, self.qweight, self.levels, self.bias, self.out_features, self.in_features
        )
        return y

    def settle(self) -> None:
        """On a GPU, levels become what the kernels of integers read."""
        super().settle()
        if self.layout == "rows" and codebooks.usable(
            self.qweight.device, self.dtype, self.in_features, self.in_features
        ):
            self.look_up()

    def look_up(self) -> None:
        """Pack for the kernels of integers, which look codes up."""
        hold(self, codebooks.of_levels(PackedLevels(self.qweight, self.levels, self.out_features, self.in_features)))
        del self._buffers["levels"]

    def moved(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See QuantLinear."""
        return held_back(self, device, dtype)

    def fresh(self) -> list[Tensor]:
        """See QuantLinear."""
        levels = self._buffers.get("levels", self._buffers.get("codebook"))
        return [self.qweight, *([] if levels is None else [levels])]

    def extra_repr(self) -> str:
        """The text that print shows."""
        return f"{super().extra_repr()}, bits={self.bits}, a codebook for each row"


class VectorsLinear(QuantLinear):
    """Bytes that select vectors of weights, with a scale for each group of a row."""

    layout = "vectors"
    table: Tensor
    scale: Tensor

    def __init__(self, weight: VectorsWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.packed.shape[-1], weight.in_features, bias, dtype)
        self.register_buffer("qweight", weight.packed)
        self.register_buffer("table", weight.table)
        self.register_buffer("scale", weight.scale)
        self.settle()

    def product(self, x: Tensor) -> Tensor:
        """See QuantLinear."""
        y: Tensor = torch.ops.llmq.vectors_linear(
            x, self.qweight, self.table, self.scale, self.bias, self.out_features, self.in_features
        )
        return y

    def settle(self) -> None:
        """There is one operator, for all devices."""
        elsewhere = self.qweight.device.type not in ("cpu", "meta")
        self.notes = {"vectors": "there is no GPU kernel for bytes that select vectors"} if elsewhere else {}

    def fresh(self) -> list[Tensor]:
        """See QuantLinear."""
        return [self.qweight, self.table]

    def extra_repr(self) -> str:
        """The text that print shows."""
        size = self.in_features // self.scale.shape[0]
        return f"{super().extra_repr()}, {self.table.shape[-1]} weights in a byte, group={size}"


def hold(layer: QuantLinear, packed: PackedInt) -> None:
    """Make a weight of codebooks the buffers of a layer, which looks its codes up from then on."""
    layer.layout = "planes"
    buffers = {"qweight": packed.packed, "scale": packed.scale, "codebook": packed.codebook, "tables": packed.tables}
    for name, tensor in buffers.items():
        layer.register_buffer(name, tensor)


def look_up(layer: Any, x: Tensor) -> Tensor:
    """The product of a layer that `hold` has packed."""
    buffers, sizes = layer._buffers, (layer.out_features, layer.in_features)
    weight = buffers["qweight"], buffers["scale"], buffers["codebook"], buffers["tables"]
    group = -(-layer.in_features // weight[1].shape[0])
    if planes.direct(x, layer.bias):
        packed, scale, *table = weight
        return planes_linear(x, PackedInt(packed, scale, None, 4, *sizes, group, *table), layer.bias)
    y: Tensor = torch.ops.llmq.codebook_linear(x, *weight, layer.bias, *sizes, group)
    return y


def held_back(layer: QuantLinear, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a layer that may be packed for the kernels of integers cannot be moved, or None."""
    if layer.layout != "planes" or device.type == layer.qweight.device.type and {dtype, layer.dtype} <= HALF:
        return None
    return f"its weight is packed as {layer.layout} for {layer.dtype}"


def quant_linear(weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
    """A layer for a weight, on the weight's device, for inputs of `dtype`; bias: float [out] or None."""
    kinds: dict[type, Any] = {
        IntWeight: IntLinear,
        CodebookWeight: CodebookLinear,
        Int8Weight: Int8Linear,
        Float8Weight: Float8Linear,
        LevelsWeight: LevelsLinear,
        VectorsWeight: VectorsLinear,
    }
    layer: QuantLinear = kinds[type(weight)](weight, bias, dtype)
    return layer
