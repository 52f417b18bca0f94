"""A goal's bounds, as costs of each group's candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from llmq.allocation import memory
from llmq.allocation.choose import Bound
from llmq.allocation.goal import Fit, Goal
from llmq.allocation.groups import Group
from llmq.allocation.memory import Line, Runtime
from llmq.errors import LlmqError
from llmq.planning.types import Plan


def bounds_of(
    plan: Plan, goal: Goal, groups: Sequence[Group]
) -> tuple[list[Bound], tuple[tuple[str, int], ...], tuple[str, ...]]:
    """The bounds of a goal; (what, bytes) of the memory beside the weights, and sentences about other contexts, if it
    has a memory. Raises LlmqError.
    """
    stored = [group.nbytes for group in groups]
    found: list[Bound] = []
    posts: tuple[tuple[str, int], ...] = ()
    more: tuple[str, ...] = ()
    if goal.bits is not None:
        limit = goal.bits * sum(group.numbers for group in groups) / 8
        found.append(Bound("stored bytes", stored, limit, "give more --target-bits"))
    elif goal.nbytes is not None:
        rest = rest_bytes(plan, groups)
        found.append(Bound("stored bytes beside all else", stored, goal.nbytes - rest, "give a larger --target-size"))
    elif goal.fit is not None:
        lines, bound = memory_bound(plan, goal.fit, groups)
        found.append(bound)
        left = ("left for the weights whose bits are chosen", int(bound.limit))
        posts = (*((line.what, line.nbytes) for line in lines), left)
        more = tuple(_other(plan, goal.fit, groups, tokens) for tokens in _around(goal.fit.context))
    else:
        found.append(Bound("stored bytes", stored, math.inf, ""))
    return found, posts, more


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
    return lines, Bound("bytes in memory", costs, left, "give more --fit")


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
