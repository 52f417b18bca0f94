"""What a quantized weight is (Scheme), and which scheme and methods go to which weights (Recipe).

Plain frozen data: nothing here touches a tensor. YAML in, YAML out, unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmq.errors import LlmqError

RANGES = ("minmax", "mse", "weighted")
RAGGED = ("error", "smaller", "channel", "keep")
ACT_ORDERS = ("none", "static")


@dataclass(frozen=True)
class Scheme:
    """An integer grid for a weight [out, in]: w ≈ (code − zero) · scale, codes in [−2^(bits−1), 2^(bits−1) − 1].

    bits: 2…8. group_size: input columns that share a scale; None is one scale per output channel.
    symmetric: zero is 0 and not stored.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise LlmqError(f"bits must be a whole number from 2 to 8, not {self.bits!r}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 2):
            raise LlmqError(f"group size must be a whole number from 2 up, or 'channel', not {self.group_size!r}")

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.bits}-bit {group} {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """How many groups a row of `width` inputs has; the group size must divide the width."""
        return 1 if self.group_size is None else width // self.group_size

    def bits_per_weight(self, rows: int, width: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of a [rows, width] matrix: codes, scales and zero points."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(width) / width


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics are taken from, and how much of it.

    text: 'demo' (the interpreter's own standard library), a .txt/.jsonl/.parquet file, or a hub data set id.
    samples × seqlen tokens, packed, never padded.
    """

    text: str = "demo"
    samples: int = 128
    seqlen: int = 2048
    split: str = "train"
    column: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes that come out, apart from the model.

    overrides: (pattern, scheme) pairs, the last match wins; keep: patterns of weights left in their own dtype. A pattern
    is a shell glob against the weight's name in the checkpoint (without '.weight'), or 're:' and a regular expression.
    """

    methods: tuple[str, ...] = ("gptq",)
    scheme: Scheme = field(default_factory=Scheme)
    overrides: tuple[tuple[str, Scheme], ...] = ()
    keep: tuple[str, ...] = ()
    ragged: str = "error"
    range: str = "weighted"
    act_order: str = "static"
    damping: float = 0.01
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0
