"""bitsandbytes' 4-bit checkpoints, NF4 and FP4; the kernel reads the stored tensors unchanged.

`write` describes the layout. The reader accepts every block size, codebook and storage dtype that bitsandbytes writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.checkpoint.tensors import TensorInfo, read_tensor
from llmq.errors import LlmqError, first_line
from llmq.formats.bitsandbytes.write import ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS, PACKED, STATE
from llmq.formats.plain import CodebookWeight, Configuration, Entry
from llmq.grids.nf4 import NESTED_BLOCK
from llmq.grids.table import find

STATES = (STATE, "weight.quant_state.bitsandbytes__fp4")
SIZES = find("nf4").group_sizes


@dataclass(frozen=True)
class CodebookLayer:
    """One weight. packed: the stored tensor of codes; offset: of double-quantized magnitudes, or None."""

    shape: tuple[int, int]
    block_size: int
    offset: float | None
    state: str
    state_size: int
    packed: Entry

    @property
    def entries(self) -> Mapping[str, Entry]:
        blocks = -(-self.shape[0] * self.shape[1] // self.block_size)
        entries = {
            PACKED: self.packed,
            ABSMAX: Entry((torch.float32 if self.offset is None else torch.uint8,), (blocks,)),
            LEVELS: Entry((torch.float32,), (16,)),
            self.state: Entry((torch.uint8,), (self.state_size,)),
        }
        if self.offset is not None:
            entries[NESTED_ABSMAX] = Entry((torch.float32,), (-(-blocks // NESTED_BLOCK),))
            entries[NESTED_LEVELS] = Entry((torch.float32,), (256,))
        return entries

    def read(self, tensors: Mapping[str, Tensor]) -> CodebookWeight:
        return CodebookWeight(
            tensors[PACKED].reshape(-1).view(torch.uint8),
            tensors[ABSMAX],
            tensors[LEVELS],
            tensors.get(NESTED_ABSMAX),
            tensors.get(NESTED_LEVELS),
            0.0 if self.offset is None else self.offset,
            *self.shape,
            self.block_size,
        )


class BitsandbytesReader:
    """config: transformers' BitsAndBytesConfig."""

    suffixes = (*STATES, PACKED, ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS, "bias")

    def __init__(self, config: Configuration) -> None:
        self.config = config

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq cannot read such checkpoints, or None."""
        if not config.load_in_4bit:
            return "its weights have 8 bits and separate outliers (LLM.int8)"
        return None

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> CodebookLayer | None:
        if ABSMAX not in stored and not any(state in stored for state in STATES):
            return None
        found = next((state for state in STATES if state in stored), None)
        if found is None:
            wanted = STATES[0] if self.config.bnb_4bit_quant_type == "nf4" else STATES[1]
            raise LlmqError(f"{stored[ABSMAX].file}: {name}.{wanted} is missing, so the weight's size is not known")
        info = stored[found]
        try:
            with torch.device("cpu"):  # transformers builds models with another device as the default
                state = json.loads(bytes(read_tensor(info).tolist()))
            rows, width = (int(n) for n in state["shape"])
            block, kind = int(state["blocksize"]), str(state["quant_type"])
            offset = float(state["nested_offset"]) if NESTED_ABSMAX in stored or "nested_offset" in state else None
            nested = int(state.get("nested_blocksize", NESTED_BLOCK))
        except (ValueError, KeyError, TypeError) as error:
            raise LlmqError(
                f"{info.file}: {info.name} does not describe a 4-bit weight: {first_line(error)}"
            ) from error
        if (rows, width) != shape:
            raise LlmqError(f"{info.file}: {info.name} says [{rows}, {width}], the model needs {[*shape]}")
        if kind != self.config.bnb_4bit_quant_type or not found.endswith(kind):
            raise LlmqError(f"{info.file}: {info.name} says {kind}, config.json {self.config.bnb_4bit_quant_type}")
        if block not in SIZES or nested != NESTED_BLOCK:
            raise LlmqError(
                f"{info.file}: {info.name} has blocks of {block} (nested {nested}); "
                f"there are kernels for {', '.join(map(str, SIZES))} (nested {NESTED_BLOCK})"
            )
        return CodebookLayer(shape, block, offset, found, info.shape[0], _packed(rows * width, stored.get(PACKED)))


def _packed(n: int, info: TensorInfo | None) -> Entry:
    """The expected tensor of n codes: bytes in any shape and, by bnb_4bit_quant_storage, viewed as any dtype."""
    needed = (n + 1) // 2
    if info is not None and info.nbytes == needed and info.dtype not in (torch.int64, torch.float64):
        return Entry((info.dtype,), info.shape)
    return Entry((torch.uint8,), (needed, 1))
