"""AWQ checkpoints in their GEMM layout (AutoAWQ, gptqmodel, auto-round): 4 bits packed along the outputs.

`qweight` int32 [in, out/8], `qzeros` int32 [groups, out/8], `scales` [groups, out]; the eight nibbles of a word, lowest
first, hold columns 0, 2, 4, 6, 1, 3, 5, 7. Zero points are stored as they are. `gptq.inspect` describes them for `llmq
inspect`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.gptq import half_scales, layout_of, refusal_of_values, settings
from llmq.formats.packing import pack_codes, packed_width
from llmq.formats.plain import FLOATS, Configuration, Entry, IntWeight, none_if_zero, part_of_rows
from llmq.grids.base import QuantizedWeight

CODES, ZEROS, SCALES_NAME = "qweight", "qzeros", "scales"
FORMATS = ("gemm", "auto_round:auto_awq", "auto_round:awq")
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word holds each of its eight columns."""


@dataclass(frozen=True)
class AWQLayer:
    """One weight."""

    shape: tuple[int, int]
    group_size: int

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        groups, words = -(-width // self.group_size), -(-rows // 8)
        return {
            CODES: Entry((torch.int32,), (width, words)),
            ZEROS: Entry((torch.int32,), (groups, words)),
            SCALES_NAME: Entry(FLOATS, (groups, rows)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> IntWeight:
        rows, width = self.shape
        stored = tensors[CODES]
        words = torch.empty(rows, packed_width(width, 4), dtype=torch.int32, device=stored.device)
        step = max(1, part_of_rows(width) // 8)
        for start in range(0, stored.shape[1], step):
            part = slice(start * 8, (start + step) * 8)
            codes = _columns(stored[:, start : start + step]).t()
            words[part] = pack_codes(codes[: words[part].shape[0]].contiguous(), 4)
        zero = none_if_zero(_columns(tensors[ZEROS])[:, :rows].t().contiguous())
        return IntWeight(words, tensors[SCALES_NAME].t().contiguous(), zero, 4, width, self.group_size)


class AWQReader:
    """config: transformers' AwqConfig or AutoRoundConfig."""

    suffixes = (CODES, ZEROS, SCALES_NAME, "weight", "bias")

    def __init__(self, config: Configuration) -> None:
        self.config = config

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq cannot read such checkpoints, or None."""
        form = getattr(layout_of(config), "value", layout_of(config)).lower()
        if form.removeprefix("awqformat.") not in FORMATS:
            return f"its weights are stored as {form!r}, not as {' or '.join(FORMATS)}"
        if config.bits != 4:
            return f"AWQ has 4 bits, not {config.bits}"
        return refusal_of_values(config)

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> AWQLayer | None:
        if CODES not in stored:
            return None
        _, group_size, _ = settings(self.config, name)
        return AWQLayer(shape, group_size if group_size > 0 else shape[1])


def _columns(words: Tensor) -> Tensor:
    """int32 [rows, words] → codes int8 [rows, 8·words], minus 8."""
    shifts = torch.tensor(NIBBLES, dtype=torch.int32, device=words.device) * 4
    nibbles = (words.unsqueeze(-1) >> shifts).bitwise_and_(15).sub_(8)
    return nibbles.to(torch.int8).flatten(1)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight, by suffix; scales are float16, as its kernels have them.

    Raises LlmqError, without the weight's name, for another grid or number of outputs.
    """
    scheme, rows = weight.scheme, len(weight.codes)
    if scheme.rules.layout or scheme.bits != 4:
        raise LlmqError(f"AWQ folders hold integers of 4 bits, not {scheme}")
    if rows % 8:
        raise LlmqError(f"AWQ packs eight outputs in a word, which do not divide {rows}: --keep the weight")
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
    return {
        CODES: _words(weight.codes.t()),
        ZEROS: _words(zero.t()),
        SCALES_NAME: half_scales(weight).t().contiguous(),
    }


def _words(codes: Tensor) -> Tensor:
    """The inverse of `_columns`."""
    order = torch.tensor(NIBBLES).argsort()
    return pack_codes(codes.reshape(len(codes), -1, 8)[..., order].flatten(1).contiguous(), 4)


READERS = {"awq": AWQReader, "auto-round": AWQReader}
PACKAGES = {"awq": "gptqmodel"}
