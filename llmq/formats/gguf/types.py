"""The types of GGUF tensors: their numbers, and the bytes of a block. From llama.cpp's ggml.h and ggml-common.h.

A block has so many values of a row, and the numbers that they share. Types whose blocks only llama.cpp makes have their
sizes here, for `llmq inspect`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmq.errors import LlmqError


@dataclass(frozen=True)
class BlockType:
    """One type. number: in a file; values, nbytes: of a block; file_type: llama.cpp's number of a file that is mostly
    of this type, or None; bits: of a value's code, without what a block shares; kind: 'int', 'float' or 'plain'."""

    name: str
    number: int
    values: int
    nbytes: int
    bits: int
    kind: str = "int"
    file_type: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """With what a block shares."""
        return 8 * self.nbytes / self.values


PLAIN = {
    "F32": (0, torch.float32, 0),
    "F16": (1, torch.float16, 1),
    "BF16": (30, torch.bfloat16, 32),
    "F64": (28, torch.float64, None),
    "I8": (24, torch.int8, None),
    "I16": (25, torch.int16, None),
    "I32": (26, torch.int32, None),
    "I64": (27, torch.int64, None),
}
"""Name → number, dtype, and the number of a file that is mostly of it."""
DTYPES = {name: dtype for name, (_, dtype, _) in PLAIN.items()}

TYPES = {
    kind.name: kind
    for kind in (
        *(
            BlockType(name, number, 1, dtype.itemsize, 8 * dtype.itemsize, "plain", file)
            for name, (number, dtype, file) in PLAIN.items()
        ),
        BlockType("Q4_0", 2, 32, 18, 4, file_type=2),
        BlockType("Q4_1", 3, 32, 20, 4, file_type=3),
        BlockType("Q5_0", 6, 32, 22, 5, file_type=8),
        BlockType("Q5_1", 7, 32, 24, 5, file_type=9),
        BlockType("Q8_0", 8, 32, 34, 8, file_type=7),
        BlockType("TQ1_0", 34, 256, 54, 2, file_type=36),
        BlockType("TQ2_0", 35, 256, 66, 2, file_type=37),
        BlockType("Q2_0", 42, 64, 18, 2, file_type=41),
        BlockType("MXFP4", 39, 32, 17, 4, "float", file_type=38),
        BlockType("NVFP4", 40, 64, 36, 4, "float", file_type=39),
        BlockType("Q2_K", 10, 256, 84, 2, file_type=10),
        BlockType("Q3_K", 11, 256, 110, 3, file_type=11),
        BlockType("Q4_K", 12, 256, 144, 4, file_type=14),
        BlockType("Q5_K", 13, 256, 176, 5, file_type=16),
        BlockType("Q6_K", 14, 256, 210, 6, file_type=18),
        # Of other tools alone.
        BlockType("Q8_1", 9, 32, 36, 8),
        BlockType("Q8_K", 15, 256, 292, 8),
        BlockType("IQ2_XXS", 16, 256, 66, 2),
        BlockType("IQ2_XS", 17, 256, 74, 2),
        BlockType("IQ3_XXS", 18, 256, 98, 3),
        BlockType("IQ1_S", 19, 256, 50, 1),
        BlockType("IQ4_NL", 20, 32, 18, 4),
        BlockType("IQ3_S", 21, 256, 110, 3),
        BlockType("IQ2_S", 22, 256, 82, 2),
        BlockType("IQ4_XS", 23, 256, 136, 4),
        BlockType("IQ1_M", 29, 256, 56, 1),
        BlockType("Q1_0", 41, 128, 18, 1),
    )
}
NUMBERS = {kind.number: kind for kind in TYPES.values()}


def of_number(number: int, where: str) -> BlockType:
    """The type of a number in a file. Raises LlmqError, with `where`, for one that is not known."""
    if number not in NUMBERS:
        raise LlmqError(f"{where} has type {number}, which llmq does not know: a newer GGUF than this llmq reads")
    return NUMBERS[number]
