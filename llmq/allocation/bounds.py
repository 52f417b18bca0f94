"""A goal's bounds, as costs of each group's candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from llmq.allocation import memory
from llmq.allocation.choose import Bound, check_bounds
from llmq.allocation.goal import Fit, Goal, Latency
from llmq.allocation.groups import Group
from llmq.allocation.latency.table import step_times
from llmq.allocation.memory import Line, Runtime
from llmq.errors import LlmqError
from llmq.planning.types import Plan
from llmq.watch import Watch

SMALLER = "--candidates with fewer bits"


@dataclass
class Bounds:
    """The bounds of a goal. posts: (what, bytes) of the memory beside the weights; more: sentences for people; times:
    milliseconds of a decode step, by group and candidate, if it has a latency."""

    bounds: list[Bound] = field(default_factory=list)
    posts: tuple[tuple[str, int], ...] = ()
    more: tuple[str, ...] = ()
    times: list[list[float]] | None = None


def bounds_of(plan: Plan, goal: Goal, groups: Sequence[Group], watch: Watch) -> Bounds:
    """The bounds of a goal. Raises LlmqError. Decode steps are timed once, which takes up to a minute or two."""
    stored = [group.nbytes for group in groups]
    made = Bounds()
    found = made.bounds
    if goal.bits is not None:
        limit = goal.bits * sum(group.numbers for group in groups) / 8
        found.append(Bound("stored bytes", stored, limit, f"give more --target-bits, or {SMALLER}"))
    elif goal.nbytes is not None:
        rest = rest_bytes(plan, groups)
        found.append(
            Bound(
                "stored bytes beside all else", stored, goal.nbytes - rest, f"give a larger --target-size, or {SMALLER}"
            )
        )
    elif goal.fit is not None:
        lines, bound = memory_bound(plan, goal.fit, groups)
        found.append(bound)
        left = ("left for the weights whose bits are chosen", int(bound.limit))
        made.posts = (*((line.what, line.nbytes) for line in lines), left)
        made.more = tuple(_other(plan, goal.fit, groups, tokens) for tokens in _around(goal.fit.context))
    elif goal.kl is not None:
        found.append(Bound("stored bytes", stored, math.inf, ""))
    if goal.latency is not None:
        # Before anything is timed.
        check_bounds(groups, found)
        made.times = _times(plan, goal.latency, groups, watch)
        way = "give more --target-latency, or other --candidates"
        found.append(Bound("milliseconds of a decode step", made.times, goal.latency.milliseconds, way))
        least, most = (sum(of(row) for row in made.times) for of in (min, max))
        made.more += (f"a decode step takes {least:.3g} ms with the fastest candidates, {most:.3g} with the slowest",)
    return made


def _times(plan: Plan, latency: Latency, groups: Sequence[Group], watch: Watch) -> list[list[float]]:
    return step_times(plan, groups, torch.device(latency.serve), latency.context, latency.batch, watch)


def _around(context: int) -> tuple[int, ...]:
    return (max(1, context // 2), context, 2 * context)


def _other(plan: Plan, fit: Fit, groups: Sequence[Group], context: int) -> str:
    """How many bits a weight may have in memory with another context, in a sentence."""
    lines, costs = _in_memory(plan, replace(fit, context=context), groups)
    least, most = (sum(of(row) for row in costs) for of in (min, max))
    left = fit.memory - sum(line.nbytes for line in lines)
    if left < least:
        return f"with {context:,} tokens: the smallest that can is --fit {memory.needed(lines, least)}MiB"
    if left >= most:
        return f"with {context:,} tokens: enough for the largest candidate of every weight"
    return f"with {context:,} tokens: {8 * left / sum(group.numbers for group in groups):.2f} bits per weight in memory"


def memory_bound(plan: Plan, fit: Fit, groups: Sequence[Group]) -> tuple[list[Line], Bound]:
    """What a process has in memory beside the weights whose bits are chosen, and the bound on these.

    Raises LlmqError if even the fewest bits are too many, with the smallest memory that is enough; and for candidates
    that the runtime would not keep packed.
    """
    for scheme in {scheme for group in groups for scheme in group.candidates if scheme is not None}:
        if fit.serve != "vllm" and memory.loads_dense(scheme):
            raise LlmqError(
                f"--candidates: a folder with a weight as {scheme} is unpacked whole when llmq loads it: leave it out, "
                "or --serve vllm"
            )
    lines, costs = _in_memory(plan, fit, groups)
    left = memory.budget(lines, fit.memory, sum(min(row) for row in costs))
    return lines, Bound("bytes in memory", costs, left, f"give more --fit, or {SMALLER}")


def _in_memory(plan: Plan, fit: Fit, groups: Sequence[Group]) -> tuple[list[Line], list[list[int]]]:
    """All but the weights whose bits are chosen, and the bytes of these, by group and candidate."""
    device = "cuda" if fit.serve == "vllm" else fit.serve
    runtime: Runtime = "vllm" if fit.serve == "vllm" else "llmq"
    lines = memory.fixed_lines(plan, device, fit.context, fit.batch, runtime)
    return lines, [memory.group_bytes(group, plan.dtype, device, runtime) for group in groups]


def rest_bytes(plan: Plan, groups: Sequence[Group]) -> int:
    """The bytes of the folder's other tensors: those that are copied, and weights with bits of their own."""
    mine = {weight.name for group in groups for weight in group.weights}
    saved = sum(item.before - item.after for item in plan.weights if item.scheme is not None and item.name not in mine)
    return plan.source.total_bytes - saved - sum(weight.before for group in groups for weight in group.weights)
