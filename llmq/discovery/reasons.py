"""Why a weight is left as it is: a kind that decisions are made on, and the sentence that people read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What sort of reason it is, as report.json names it."""

    BY_USER = "by_user"
    INDIVISIBLE = "indivisible"
    OUTSIDE = "outside_blocks"
    SHARED = "shared"
    UNUSED = "unused"
    NOT_LINEAR = "not_linear"
    IN_PARTS = "in_parts"
    REPEATED = "repeated"
    NOT_LOADABLE = "not_loadable"
    NOT_STORED = "not_stored"
    NOT_LOADED = "not_loaded"
    UNTOLD = "untold"


@dataclass(frozen=True)
class Reason:
    """Why a weight with two or more axes is not quantized.

    kind: BY_USER: --keep matches it; INDIVISIBLE: the group size does not divide its width; OUTSIDE: it is in no
    decoder block; SHARED: between blocks; UNUSED: in no matrix product; NOT_LINEAR: not of a Linear module, or not
    multiplied by it; IN_PARTS: used in slices; REPEATED: used several times in a block; NOT_LOADABLE: stock
    transformers fails to load it packed; NOT_STORED: the checkpoint has it in another form or not at all; NOT_LOADED: a
    tensor that the model does not have; UNTOLD: in the report of an earlier llmq.
    sentence: the same for people, with what is particular to the weight.
    """

    kind: Kind
    sentence: str

    def __str__(self) -> str:
        return self.sentence
