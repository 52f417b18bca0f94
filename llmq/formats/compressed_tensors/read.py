"""compressed-tensors checkpoints of integer weights: pack-quantized, and int-quantized with or without W8A8; of FP8
with a scale per channel and rounded inputs; and of 4-bit floats, where they stand for a stack of experts, which only
llmq's kernels run.

`packed` and `eight_bit` describe the layouts that llmq writes. The readers here also accept other writers' integer
weights: zero points, activation order, one scale per tensor, 5 to 7 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.compressed_tensors.cache import KEY, VALUE
from llmq.formats.compressed_tensors.eight_bit import INPUT_SCALE, WEIGHT
from llmq.formats.compressed_tensors.microscaled import DIVIDED, FOURS, GLOBAL, FourBitLayer
from llmq.formats.compressed_tensors.packed import PACKED, SCALE, SHAPE, ZERO
from llmq.formats.packing import pack_codes, packed_width, unpack_columns
from llmq.formats.plain import (
    FLOATS,
    Configuration,
    Entry,
    Float8Weight,
    Int8Weight,
    IntWeight,
    in_groups,
    none_if_zero,
    part_of_rows,
    served,
)

GROUPS = "weight_g_idx"
PACK, CODES, FLOAT8 = ("pack-quantized",), ("int-quantized", "naive-quantized"), ("float-quantized", "naive-quantized")


@dataclass(frozen=True)
class PackedLayer:
    """A weight whose input is not rounded.

    packed: codes are stored as a bit stream, not one per byte; scales: their stored shape; zeros: the stored zero
    points of a symmetric weight, which does not need them, or None.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    packed: bool
    ordered: bool
    scales: tuple[int, ...]
    zeros: Entry | None = None

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        groups = -(-width // self.group_size)
        entries = {SCALE: Entry(FLOATS, self.scales)}
        if self.packed:
            entries[PACKED] = Entry((torch.int32,), (rows, packed_width(width, self.bits)))
            entries[SHAPE] = Entry((torch.int64, torch.int32), (2,))
        else:
            entries[WEIGHT] = Entry((torch.int8,), (rows, width))
        if self.zeros is not None:
            entries[ZERO] = self.zeros
        elif not self.symmetric:
            entries[ZERO] = (
                Entry((torch.int32,), (packed_width(rows, self.bits), groups))
                if self.packed
                else Entry((torch.int8,), self.scales)
            )
        return entries | ({GROUPS: Entry((torch.int32, torch.int64), (width,))} if self.ordered else {})

    def read(self, tensors: Mapping[str, Tensor]) -> IntWeight:
        rows, width = self.shape
        groups = -(-width // self.group_size)
        if self.packed:
            said = tuple(int(n) for n in tensors[SHAPE].tolist())
            if said != self.shape:
                raise LlmqError(f"{SHAPE} says {[*said]}, the model needs {[*self.shape]}")
            words = tensors[PACKED]
        else:
            words = pack_codes(tensors[WEIGHT], self.bits)
        zero = None
        if self.zeros is not None:
            packed = self.packed and tensors[ZERO].shape == (packed_width(rows, self.bits), groups)
            _refuse_zeros(unpack_columns(tensors[ZERO], self.bits, rows) if packed else tensors[ZERO])
        elif not self.symmetric:
            stored = tensors[ZERO]
            zero = unpack_columns(stored, self.bits, rows) if self.packed else stored
            zero = none_if_zero(zero.expand(rows, groups).contiguous())
        order = None
        if self.ordered and int(tensors[GROUPS].min()) >= 0:
            words, order = in_groups(words, self.bits, width, tensors[GROUPS], self.group_size)
        words, bits = served(words, self.bits, width)
        return IntWeight(words, _spread(tensors[SCALE], rows, groups), zero, bits, width, self.group_size, order)


@dataclass(frozen=True)
class EightBitLayer:
    """A weight with 8-bit activations of its kind. static: the shape of their stored scale, if it is; zeros: as in
    PackedLayer; kind: the dtype of codes, int8 or float8_e4m3fn.
    """

    shape: tuple[int, int]
    scales: tuple[int, ...]
    static: tuple[int, ...] | None
    zeros: Entry | None = None
    kind: torch.dtype = torch.int8

    @property
    def entries(self) -> Mapping[str, Entry]:
        entries = {WEIGHT: Entry((self.kind,), self.shape), SCALE: Entry(FLOATS, self.scales)}
        if self.zeros is not None:
            entries[ZERO] = self.zeros
        return entries | ({} if self.static is None else {INPUT_SCALE: Entry(FLOATS, self.static)})

    def read(self, tensors: Mapping[str, Tensor]) -> Int8Weight | Float8Weight:
        if self.zeros is not None:
            _refuse_zeros(tensors[ZERO])
        inputs = None if self.static is None else tensors[INPUT_SCALE].reshape(1)
        codes, scale = tensors[WEIGHT], _spread(tensors[SCALE], self.shape[0], 1)
        if self.kind == torch.int8:
            return Int8Weight(codes, scale, inputs)
        _refuse_nan(codes)
        return Float8Weight(codes, scale, inputs)


class CompressedTensorsReader:
    """Keys and values stay as they are, whatever the configuration says of the cache: their scales are left aside.

    config: transformers' CompressedTensorsConfig; with `ordered`, the config groups whose weights need a g_idx."""

    suffixes = (PACKED, SCALE, GLOBAL, SHAPE, ZERO, GROUPS, INPUT_SCALE, WEIGHT, "bias")
    aside = (KEY, VALUE)

    def __init__(self, config: Configuration) -> None:
        self.config = config.quantization_config
        groups, ordered = self.config.config_groups, getattr(config, "ordered", ())
        self.schemes = {target: scheme for scheme in groups.values() for target in scheme.targets or ()}
        self.ordered = [scheme for name, scheme in groups.items() if name in ordered]

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq cannot read such checkpoints, or None."""
        if getattr(config, "dequantize", False):  # transformers < 5.21 has none
            return "dequantize=True asks for dense weights"
        if not config.is_quantization_compressed:
            return "its weights are not stored quantized"
        for scheme in config.quantization_config.config_groups.values():
            form = str(scheme.format or config.quantization_config.format)
            if getattr(config, "alone", False) and form in FOURS and scheme.input_activations is None:
                continue
            reason = _refusal(scheme, form)
            if reason is not None:
                return reason
        return None

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> PackedLayer | EightBitLayer | FourBitLayer | None:
        scheme = self._scheme(name, module)
        info = next((stored[s] for s in (PACKED, SCALE) if s in stored), None)
        if scheme is None:
            if info is not None:
                raise LlmqError(
                    f"{info.file}: config.json says that {name} is not quantized, but {info.name} is stored"
                )
            return None
        if info is None:
            found = stored.get(WEIGHT)
            if found is not None:
                raise LlmqError(
                    f"{found.file}: config.json says {name} is quantized, but {found.name} is an ordinary "
                    f"{str(found.dtype).removeprefix('torch.')} tensor without scales"
                )
            return None
        weights, inputs = scheme.weights, scheme.input_activations
        width = shape[1]
        group_size = weights.group_size if weights.strategy == "group" else width
        scales: tuple[int, ...] = (shape[0], -(-width // group_size))
        if weights.strategy == "tensor":
            scales = stored[SCALE].shape if SCALE in stored and stored[SCALE].shape in ((1, 1), ()) else (1,)
        # In any shape: some writers store the zero points of symmetric weights, and not all pack them.
        zeros = Entry((stored[ZERO].dtype,), stored[ZERO].shape) if weights.symmetric and ZERO in stored else None
        if inputs is not None:
            one = None
            if not inputs.dynamic:
                one = () if INPUT_SCALE in stored and stored[INPUT_SCALE].shape == () else (1,)
            kind = torch.float8_e4m3fn if weights.type == "float" else torch.int8
            return EightBitLayer(shape, scales, one, zeros, kind)
        form = str(scheme.format or self.config.format)
        if form in FOURS:
            group_size = weights.group_size or width
            if width % group_size:
                raise LlmqError(f"{info.file}: {name} has {width} inputs, and config.json says groups of {group_size}")
            return FourBitLayer(shape, group_size, form in DIVIDED)
        packed = form in PACK
        ordered = GROUPS in stored or any(scheme is one for one in self.ordered)
        return PackedLayer(shape, weights.num_bits, group_size, weights.symmetric, packed, ordered, scales, zeros)

    def _scheme(self, name: str, module: nn.Module) -> Any:
        """The module's scheme by compressed-tensors' own matching, or None."""
        from compressed_tensors.utils.match import is_match, match_targets

        if is_match(name, module, self.config.ignore or ()):
            return None
        matched = match_targets(name, module, self.schemes)
        return self.schemes[matched[0]] if matched else None


def _refuse_zeros(zero: Tensor) -> None:
    """Raises LlmqError unless the zero points of a symmetric weight are all 0."""
    if bool(zero.any()):
        raise LlmqError(f"config.json says that the weight is symmetric, but {ZERO} has other values than 0")


def _spread(scale: Tensor, rows: int, groups: int) -> Tensor:
    """A scale expanded to [rows, groups], from that shape or from one value for all."""
    return scale if scale.shape == (rows, groups) else scale.reshape(1, 1).expand(rows, groups).contiguous()


def _refuse_nan(codes: Tensor) -> None:
    """Raises LlmqError if a float8_e4m3fn weight has a NaN, which kernels take for a number."""
    step = part_of_rows(codes.shape[1])
    for start in range(0, len(codes), step):
        if bool(((codes[start : start + step].view(torch.int8) & 0x7F) == 0x7F).any()):
            raise LlmqError("the weight holds values that are not finite")


def _refusal(scheme: Any, form: str) -> str | None:
    """Why llmq has no kernel for the weights of one scheme, or None."""
    weights, inputs = scheme.weights, scheme.input_activations
    if form not in PACK + CODES + FLOAT8:
        return f"its weights are stored as {form}"
    if scheme.output_activations is not None:
        return "it quantizes the outputs of layers"
    if weights is not None and weights.type == "float":
        return _float_refusal(weights, inputs, form)
    if form not in PACK + CODES or weights is None or weights.strategy not in ("group", "channel", "tensor"):
        return "its weights are not integers with a scale per group, channel or tensor"
    if not 2 <= weights.num_bits <= 8:
        return f"its weights have {weights.num_bits} bits"
    if inputs is None:
        return None
    if not _plain(inputs, "int"):
        return "it rounds activations, but not to symmetric int8 with one scale per token or a static scale per tensor"
    if form in PACK or weights.num_bits != 8 or not weights.symmetric or weights.strategy == "group":
        return "it rounds activations, but its weights are not symmetric int8 with a scale per channel"
    return None


def _float_refusal(weights: Any, inputs: Any, form: str) -> str | None:
    """Why llmq has no kernel for weights of floats, or None."""
    if weights.strategy not in ("channel", "tensor") or weights.num_bits != 8 or not weights.symmetric:
        return "its weights are not float8 with a scale per channel or tensor"
    if inputs is None:
        return "its weights are float8, but it does not round activations"
    if not _plain(inputs, "float"):
        return "it rounds activations, but not to float8 with one scale per token or a static scale per tensor"
    return None if form in FLOAT8 else f"its weights are stored as {form}"


def _plain(inputs: Any, kind: str) -> bool:
    """Whether activations are rounded to 8 bits of a kind, per token, or with a static scale per tensor."""
    plain = inputs.type == kind and inputs.num_bits == 8 and inputs.symmetric
    return plain and bool(inputs.strategy == ("token" if inputs.dynamic else "tensor"))
