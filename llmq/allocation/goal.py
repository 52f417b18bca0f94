"""What is asked for: a budget for the bits, and the candidates that may be chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.grids.table import GRIDS
from llmq.machine import has_cuda, size
from llmq.recipe.recipe import Recipe
from llmq.validate import check_choice

USUAL = "2,3,4,5,6,8,16"
SERVE = ("cpu", "cuda", "vllm")
_INTEGER = re.compile(r"(\d+)(?:g(\d+)|(channel))?(a?)")


@dataclass(frozen=True)
class Fit:
    """Memory in bytes for a process that serves the model: its weights, the keys and values of `context` tokens for
    each of `batch` requests, and its own share. serve: where it runs: 'cpu' or 'cuda' on llmq's kernels, or 'vllm'."""

    memory: int
    context: int = 4096
    batch: int = 1
    serve: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("--serve", self.serve, SERVE)


@dataclass(frozen=True)
class Latency:
    """Milliseconds from one token to the next, of `batch` rows after `context` tokens each, on llmq's kernels on this
    machine. serve: 'cpu' or 'cuda'."""

    milliseconds: float
    context: int = 4096
    batch: int = 1
    serve: str = "cpu"

    def __post_init__(self) -> None:
        if self.serve == "vllm":
            raise LlmqError("--target-latency: times are measured on llmq's kernels, not in vLLM: --serve cpu or cuda")
        check_choice("--serve", self.serve, SERVE)
        if self.serve == "cuda" and not has_cuda():
            raise LlmqError("--target-latency: times are measured on this machine, which has no GPU: --serve cpu")
        if not self.milliseconds > 0:
            raise LlmqError(f"--target-latency must be above 0, not {self.milliseconds:g}")


@dataclass(frozen=True)
class Goal:
    """What the bits of a model's weights are chosen for: the least loss within all bounds that are given.

    bits: stored bits per quantized weight, with scales and zero points; nbytes: of the folder's weights; kl: instead of
    the least loss, the fewest bytes whose predicted divergence is at most this, in nats; latency: of a decode
    step, alone or beside one of the others; candidates: schemes, None for unquantized; score: how the loss of each
    candidate is found (`allocation.scores`), None for the best that the model's size allows; prove: whether the best
    allocations are compared by their real divergence.
    """

    bits: float | None = None
    nbytes: int | None = None
    kl: float | None = None
    fit: Fit | None = None
    latency: Latency | None = None
    candidates: tuple[Scheme | None, ...] = ()
    score: str | None = None
    prove: bool = True

    def __post_init__(self) -> None:
        given = [self.bits, self.nbytes, self.kl, self.fit, self.latency]
        bounds = [one for one in (self.bits, self.nbytes, self.fit) if one is not None]
        if not any(one is not None for one in given):
            raise LlmqError("a goal needs a budget: bits, bytes, memory, a time or a divergence")
        if len(bounds) > 1:
            raise LlmqError("--target-bits, --target-size and --fit all bound the same bytes: give one of them")
        for what, value in (("--target-bits", self.bits), ("--target-size", self.nbytes), ("--max-kl", self.kl)):
            if value is not None and not value > 0:
                raise LlmqError(f"{what} must be above 0, not {value:g}")

    def told(self) -> str:
        """The goal in words."""
        found = [] if self.bits is None else [f"{self.bits:g} bits per weight"]
        found += [] if self.nbytes is None else [f"a folder of {size(self.nbytes)}"]
        found += [] if self.kl is None else [f"a divergence of {self.kl:g} nats"]
        if self.fit is not None:
            found.append(f"{size(self.fit.memory)} of memory with {self.fit.batch} × {self.fit.context:,} tokens")
        if self.latency is not None:
            one = self.latency
            found.append(f"{one.milliseconds:g} ms a token with {one.batch} × {one.context:,} tokens")
        return " and ".join(found)

    def schemes(self, recipe: Recipe) -> tuple[Scheme | None, ...]:
        """The candidates, or the usual ones with the recipe's group size and symmetry."""
        return self.candidates or parse_candidates(USUAL, recipe.scheme)


def parse_candidates(text: str, base: Scheme) -> tuple[Scheme | None, ...]:
    """'2,3g64,4,8,16' → schemes: bits, maybe with a group size ('g64', 'channel') and zero points ('a'), or a grid's
    name ('fp8'); 16 or 'none' leaves weights as they are. base: has what is not given. Raises LlmqError.
    """
    found: list[Scheme | None] = []
    for word in (part.strip() for part in text.split(",")):
        if word in ("16", "none"):
            found.append(None)
        elif word in GRIDS:
            rules = GRIDS[word]
            group = base.group_size if not rules.group_sizes or base.group_size in rules.group_sizes else None
            if group is None and rules.group_sizes and None not in rules.group_sizes:
                group = rules.group_sizes[0]
            width = base.bits if base.bits in rules.bits else rules.bits[0]
            made = {
                "grid": word,
                "bits": width,
                "group_size": group or "channel",
                "symmetric": not rules.minima,
            }
            found.append(changed_scheme(made, base, f"--candidates {word}"))
        elif (match := _INTEGER.fullmatch(word)) is not None:
            bits, group_size, channel, asymmetric = match.groups()
            changes: dict[str, Any] = {"bits": int(bits)}
            changes |= {"group_size": int(group_size)} if group_size else {}
            changes |= {"group_size": "channel"} if channel else {}
            changes |= {"symmetric": False} if asymmetric else {}
            found.append(changed_scheme(changes, replace(base, activations=None), f"--candidates {word}"))
        else:
            raise LlmqError(f"--candidates {text!r}: {word!r} is none: write bits and group sizes, as in 2,3g64,4,8,16")
    if not any(found):
        raise LlmqError(f"--candidates {text!r}: give at least one with fewer bits")
    return tuple(dict.fromkeys(found))
