"""Launch configurations: which kernel runs a product, in what tile, on which GPU.

`choose` looks into the user's table, then the shipped one, then asks `rule`, which knows only counts: multiprocessors,
bytes in flight, warps. No kernel is ever timed behind a user's back; `llmq tune` writes the user's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that its machine code depends on: what scripts/compile_kernels.py compiles.

    signature: argument → triton type ("*bf16", "i32", "constexpr"); constexprs: values of the constexpr ones;
    divisible: arguments that are multiples of 16 at every launch in practice (pointers, strides), as triton's own
    launcher finds out by looking at them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible: tuple[str, ...] = field(default=())
