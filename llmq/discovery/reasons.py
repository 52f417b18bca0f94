"""Why a weight is not quantized: a kind, for decisions in code, and a sentence, for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kind of a reason, as in report.json."""

    BY_USER = "by_user"
    INDIVISIBLE = "indivisible"
    OUTSIDE = "outside_blocks"
    SHARED = "shared"
    UNUSED = "unused"
    NOT_LINEAR = "not_linear"
    IN_PARTS = "in_parts"
    REPEATED = "repeated"
    ROUTER = "router"
    SMALL = "small"
    BEHIND = "behind_experts"
    STACKED = "stacked"
    NOT_LOADABLE = "not_loadable"
    NOT_STORED = "not_stored"
    NOT_LOADED = "not_loaded"
    UNTOLD = "untold"


@dataclass(frozen=True)
class Reason:
    """Why a weight with two or more axes is not quantized.

    kind: BY_USER: --keep matches it; INDIVISIBLE: the group size does not divide its width; OUTSIDE: it is in no
    decoder block; SHARED: between blocks; UNUSED: in no matrix product; NOT_LINEAR: not of a Linear module, or that
    module is not called; IN_PARTS: used in slices; REPEATED: used several times in a block; ROUTER: it
    chooses experts; SMALL: it has few outputs, in a mixture; BEHIND: the output of the routed
    experts feeds it; STACKED: one tensor stores it for all experts; NOT_LOADABLE: stock
    transformers fails to load it packed; NOT_STORED: the checkpoint has it in another form or not at all; NOT_LOADED: a
    tensor that is no parameter of the model; UNTOLD: an earlier llmq's report gives no kind. sentence: the reason for
    people, with the weight's details.
    """

    kind: Kind
    sentence: str

    def __str__(self) -> str:
        return self.sentence
