"""GPTQ checkpoints (gptqmodel, AutoGPTQ, auto-round): codes packed along the inputs, one row per word.

Each column of `qweight` int32 [in·bits/32, out] is the dense little-endian bit stream from which kernel layouts are
packed, at every bit width: with 3 bits, 32 values fill 3 words. `qzeros` int32 [groups, out·bits/32] is packed the same
way along the outputs; "gptq" (v1) stores zero − 1 modulo 2^bits, "gptq_v2" zero itself. `scales` [groups, out]; `g_idx`
int32 [in] gives each input's group, if groups are not consecutive inputs (act-order). Found in files of gptqmodel 7.6
and auto-round 0.16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError, first_line
from llmq.formats.base import Row, Unclear, check_named, dtype_name, inputs_per_scale, outputs_beside, whole
from llmq.formats.packing import pack_codes, packed_width, unpack_codes
from llmq.formats.plain import BITS, FLOATS, Configuration, Entry, IntWeight, in_groups, mapping, none_if_zero
from llmq.grids.base import QuantizedWeight, rounding_of

CODES, ZEROS, SCALES_NAME, GROUPS = "qweight", "qzeros", "scales", "g_idx"
FORMATS = {
    "gptq": 1,
    "gptq_v2": 0,
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round": 0,
}
"""The layout's name in a checkpoint → the offset to add to its stored zero points."""


@dataclass(frozen=True)
class GPTQLayer:
    """One weight. offset: to add to the stored zero points; ordered: whether it must have a g_idx."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    offset: int
    ordered: bool

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        groups = -(-width // self.group_size)
        entries = {
            CODES: Entry((torch.int32,), (packed_width(width, self.bits), rows)),
            ZEROS: Entry((torch.int32,), (groups, packed_width(rows, self.bits))),
            SCALES_NAME: Entry(FLOATS, (groups, rows)),
        }
        return entries | ({GROUPS: Entry((torch.int32, torch.int64), (width,))} if self.ordered else {})

    def read(self, tensors: Mapping[str, Tensor]) -> IntWeight:
        rows, width = self.shape
        zero = unpack_codes(tensors[ZEROS], self.bits, rows)
        if self.offset:
            highest = (1 << (self.bits - 1)) - 1
            zero = torch.where(zero == highest, -highest - 1, zero + 1).to(torch.int8)
        words, order = tensors[CODES].t().contiguous(), None
        if self.ordered:
            words, order = in_groups(words, self.bits, width, tensors[GROUPS], self.group_size)
        zero_point = none_if_zero(zero.t().contiguous())
        scale = tensors[SCALES_NAME].t().contiguous()
        return IntWeight(words, scale, zero_point, self.bits, width, self.group_size, order)


class GPTQReader:
    """config: transformers' GPTQConfig, with the checkpoint's `dynamic` if it has one, or AutoRoundConfig."""

    suffixes = (CODES, ZEROS, SCALES_NAME, GROUPS, "weight", "bias")

    def __init__(self, config: Configuration) -> None:
        self.config = config
        self.offset = FORMATS[layout_of(config)]

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq cannot read such checkpoints, or None."""
        if layout_of(config) not in FORMATS:
            return f"its weights are stored as {layout_of(config)!r}, not as {' or '.join(FORMATS)}"
        return refusal_of_values(config)

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> GPTQLayer | None:
        if CODES not in stored:
            return None
        bits, group_size, ordered = settings(self.config, name)
        ordered = ordered or GROUPS in stored
        return GPTQLayer(shape, bits, group_size if group_size > 0 else shape[1], self.offset, ordered)


def layout_of(config: Configuration) -> str:
    """The configuration's name for its weights' layout."""
    return str(getattr(config, "packing_format", None) or config.format)


def refusal_of_values(config: Configuration) -> str | None:
    """Why the kernels do not support the values of a GPTQ, AWQ or auto-round configuration, or None."""
    if config.bits not in BITS:
        return f"it has {config.bits} bits, and there are kernels for {', '.join(map(str, BITS))}"
    if str(getattr(config, "data_type", "int")) != "int":
        return f"its values are {config.data_type}, not integers"
    if getattr(config, "act_bits", 16) not in (None, 16, 32):
        return f"its activations have {config.act_bits} bits"
    return None


def settings(config: Configuration, name: str) -> tuple[int, int, bool]:
    """Bits and group size of a module's weight, and whether it needs a g_idx, including per-module settings.

    Raises LlmqError if the module should not be quantized, has bits without a kernel, or the configuration is invalid.
    """
    own, excluded = own_settings(getattr(config, "extra_config", None), getattr(config, "dynamic", None), name)
    if excluded is not None:
        raise LlmqError(
            f"config.json says that {name} is not quantized ({excluded!r}), but its weight is stored quantized"
        )
    bits, group_size = own.get("bits", config.bits), own.get("group_size", config.group_size)
    if bits not in BITS:
        raise LlmqError(f"config.json gives {name} {bits} bits, and there are kernels for {', '.join(map(str, BITS))}")
    return bits, group_size, bool(own.get("desc_act", getattr(config, "desc_act", False)))


def own_settings(extra_config: Any, dynamic: Any, name: str) -> tuple[Mapping[str, Any], str | None]:
    """A module's own settings, empty if it has none, and the pattern that says it is not quantized, or None.

    `dynamic` (gptqmodel): regular expression → other settings, where '-:' marks an unquantized module; `extra_config`
    (auto-round): name or regular expression → other settings. Raises LlmqError if the configuration is invalid.
    """
    own: Mapping[str, Any] = {}
    for pattern, changes in mapping(extra_config, "extra_config").items():
        if pattern == name or _expression(pattern, "extra_config").fullmatch(name):
            own = mapping(changes, f"extra_config {pattern!r}")
            break
    for pattern, changes in mapping(dynamic, "dynamic").items():
        kind = pattern[:2] if pattern[:2] in ("+:", "-:") else ""
        if _expression(pattern.removeprefix(kind), "dynamic").match(name):
            if kind == "-:":
                return own, pattern
            return mapping(changes, f"dynamic {pattern!r}"), None
    return own, None


def _expression(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression from config.json."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LlmqError(f"config.json: {key} has {pattern!r}, no regular expression: {first_line(error)}") from error


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of the tensors that store it.

    GPTQ packs along the inputs, AWQ along the outputs; scales are [groups, out] in both. Raises Unclear if bits, shapes
    and configuration do not fit together.
    """
    own, excluded = own_settings(config.get("extra_config"), config.get("dynamic"), module)
    if excluded is not None:
        raise Unclear(f"config.json says that it is not quantized ({excluded!r})")
    layout = str(config.get("packing_format") or config.get("checkpoint_format") or config.get("version") or "")
    if layout and layout.lower() not in LAYOUTS:
        raise Unclear(f"it is stored as {layout!r}")
    words, scales, zeros = parts[CODES], parts[SCALES_NAME], parts.get(ZEROS)
    if any(len(part.shape) != 2 for part in (words, scales, *([zeros] if zeros else []))):
        raise Unclear(f"{CODES} is {[*words.shape]}, {SCALES_NAME} {[*scales.shape]}")
    groups, out = scales.shape
    stated = whole(own, "bits") or whole(config, "bits", "w_bit")
    found = _widths(parts, out)
    if stated is not None and stated not in found:
        raise Unclear(f"config.json says {stated} bits, its tensors are for {' or '.join(map(str, found)) or 'none'}")
    if stated is None and len(found) != 1:
        raise Unclear(
            f"config.json does not say its bits, its tensors are for {' or '.join(map(str, found)) or 'none'}"
        )
    bits = stated or next(iter(found))
    size = whole(own, "group_size")
    group = inputs_per_scale(found[bits], groups, whole(config, "group_size", "q_group_size") if size is None else size)
    if len(found) > 1:
        check_named(
            found[bits], bits, source.config, outputs_beside(source, module, {SCALES_NAME: -1, "weight": -2}), found
        )
    nbytes = sum(part.nbytes for part in parts.values())
    symmetric = config.get("sym", not config["zero_point"] if "zero_point" in config else method != "awq")
    dtype = dtype_name(words.dtype)
    return Row(
        f"{module}.weight", (out, found[bits]), "int", bits, group, bool(own.get("sym", symmetric)), None, nbytes, dtype
    )


def _widths(parts: Mapping[str, TensorInfo], out: int) -> dict[int, int]:
    """Bits → inputs, for every width of codes that these tensors can have."""
    words, zeros, order = parts[CODES], parts.get(ZEROS), parts.get(GROUPS)
    per_word, found = 8 * words.dtype.itemsize, {}
    for bits in range(2, 9):
        across = -(-out * bits // per_word)
        if zeros is not None and zeros.shape != (parts[SCALES_NAME].shape[0], across):
            continue
        if words.shape[1] == out:
            inputs = math.prod(order.shape) if order is not None else words.shape[0] * per_word // bits
            if -(-inputs * bits // per_word) == words.shape[0]:
                found[bits] = inputs
        elif zeros is not None and words.shape[1] == across:
            found[bits] = words.shape[0]
    return found


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a weight of integers, by suffix, in AutoGPTQ's first layout: zero points are stored minus 1.

    Scales are float16, as its kernels have them. Raises LlmqError, without the weight's name, if they do not hold it.
    """
    scheme, (rows, width) = weight.scheme, weight.codes.shape
    if scheme.rules.layout or scheme.bits not in BITS:
        raise LlmqError(f"GPTQ folders hold integers of {', '.join(map(str, BITS))} bits, not {scheme}")
    if width * scheme.bits % 32 or rows * scheme.bits % 32:
        raise LlmqError(f"GPTQ's words of 32 bits do not divide a weight [{rows}, {width}]: --keep it")
    codes = rounding_of(scheme.rules).decode(weight.codes, scheme).to(torch.int8)
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
    if bool((zero == scheme.qmin).any()):
        raise LlmqError(
            "GPTQ's first layout does not hold a zero point at the lowest code: --to awq, or quantize with --symmetric"
        )
    group = torch.arange(width, dtype=torch.int32) // (width // weight.scale.shape[1])
    return {
        CODES: pack_codes(codes, scheme.bits).t().contiguous(),
        ZEROS: pack_codes((zero - 1).t().contiguous(), scheme.bits),
        SCALES_NAME: half_scales(weight).t().contiguous(),
        GROUPS: group,
    }


def half_scales(weight: QuantizedWeight) -> Tensor:
    """The scales of a weight in float16. Raises LlmqError, without its name, if one is too large."""
    if float(weight.scale.abs().amax()) > torch.finfo(torch.float16).max:
        raise LlmqError("a scale is too large for float16: --keep the weight")
    return weight.scale.to(torch.float16)


LAYOUTS = {*FORMATS, "gemm", "ipex", "auto_round:auto_awq", "auto_round:awq"}
"""The layouts that `inspect` knows, as configurations of GPTQ and AWQ name them."""
READERS = {"gptq": GPTQReader, "auto-round": GPTQReader}
PACKAGES = {"gptq": "gptqmodel"}
COMPANIONS = {CODES: (ZEROS, SCALES_NAME, GROUPS)}
SCALES = (SCALES_NAME,)
