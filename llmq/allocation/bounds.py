"""A goal's bounds, as costs of each group's candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmq.allocation.choose import Bound
from llmq.allocation.goal import Goal
from llmq.allocation.groups import Group
from llmq.planning.types import Plan


def bounds_of(plan: Plan, goal: Goal, groups: Sequence[Group]) -> list[Bound]:
    """The bounds of a goal: one on bytes, and one on milliseconds if it has a latency. Raises LlmqError."""
    stored = [group.nbytes for group in groups]
    found = []
    if goal.bits is not None:
        limit = goal.bits * sum(group.numbers for group in groups) / 8
        found.append(Bound("stored bytes", stored, limit, "give more --target-bits"))
    elif goal.nbytes is not None:
        rest = rest_bytes(plan, groups)
        found.append(Bound("stored bytes beside all else", stored, goal.nbytes - rest, "give a larger --target-size"))
    else:
        found.append(Bound("stored bytes", stored, math.inf, ""))
    return found


def rest_bytes(plan: Plan, groups: Sequence[Group]) -> int:
    """The bytes of the folder's other tensors: those that are copied, and weights with bits of their own."""
    mine = {weight.name for group in groups for weight in group.weights}
    saved = sum(item.before - item.after for item in plan.weights if item.scheme is not None and item.name not in mine)
    return plan.source.total_bytes - saved - sum(weight.before for group in groups for weight in group.weights)
