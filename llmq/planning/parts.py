"""The weights of experts that are parts of a block's parameters, and the groups in which they are quantized.

The block is in memory whole. The statistics of all its experts can need more memory than the block itself, so they are
collected for one group of experts at a time, each with its own pass of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from llmq.checkpoint.source import Source
from llmq.discovery.blocks import Structure
from llmq.discovery.names import Links
from llmq.discovery.parts import PartsInfo
from llmq.planning.experts import ExpertGroup, of_block
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe

SHARE = 2  # a group's statistics and codes take at most 1/SHARE of the memory of all experts of the block


@dataclass(frozen=True)
class PartsPlan:
    """The experts of a block that are parts of its parameters. weights: all of them, by `View.name`, in order."""

    weights: dict[str, WeightPlan]
    groups: list[ExpertGroup]

    def of(self, group: ExpertGroup) -> dict[str, WeightPlan]:
        """The weights of a group."""
        return {n: w for n, w in self.weights.items() if w.expert is not None and group.begin <= w.expert < group.end}

    @property
    def parameters(self) -> set[str]:
        """The parameters, by their names in the block, that they are parts of."""
        return {weight.view.parameter for weight in self.weights.values() if weight.view is not None}


def plan_parts(
    source: Source, recipe: Recipe, model: nn.Module, structure: Structure, links: Links, dtype: torch.dtype
) -> list[WeightPlan]:
    """The weights of all such experts; else a stack with the reason."""
    items: list[WeightPlan] = []
    widths = sorted(_widths(model, structure))
    for index, block in enumerate(structure.blocks):
        base, stacks = 1 + max((w.input_id for w in block.weights), default=-1), sum(len(p.stacks) for p in block.parts)
        for info in block.parts:
            found = of_block(source, recipe, model, block, info, index, links, dtype, widths)
            items += [_placed(item, info, base, stacks) for item in found]
    return items


def _placed(item: WeightPlan, info: PartsInfo, base: int, stacks: int) -> WeightPlan:
    """A weight of an expert, whose view is that in the expert alone, with its view in the block."""
    if item.expert is None or item.view is None:
        return item
    stack = info.stacks[item.view.parameter]
    view = replace(item.view, parameter=f"{info.module}.{item.view.parameter}", index=item.expert, count=stack.count)
    return replace(item, view=view, input_id=base + item.expert * stacks + stack.input_id)


def _widths(model: nn.Module, structure: Structure) -> set[int]:
    """The widths of all these experts' weights."""
    found = set()
    for block in structure.blocks:
        for info in block.parts:
            for name, stack in info.stacks.items():
                shape = model.get_parameter(f"{block.name}.{info.module}.{name}").shape
                rows = shape[-2] // (stack.count or 1)
                found.add(rows if stack.axis == 0 else shape[-1])
    return found


def codes(items: Iterable[WeightPlan]) -> int:
    """The bytes of some weights' codes before they are packed: one byte each."""
    return sum(item.shape[0] * item.shape[1] for item in items)


def group_parts(
    index: int, items: list[WeightPlan], dtype: torch.dtype, statistics: Callable[[list[WeightPlan]], int]
) -> PartsPlan | None:
    """The plan of a block's experts; None if they are not quantized.

    items: of the block; statistics: the bytes of the statistics of some weights.
    """
    mine = [item for item in items if item.expert is not None and item.scheme is not None and item.view is not None]
    if not mine:
        return None
    one: dict[int, list[WeightPlan]] = {}
    for item in mine:
        assert item.expert is not None
        one.setdefault(item.expert, []).append(item)
    need = max(statistics(expert) + codes(expert) for expert in one.values())
    held = codes(mine) * dtype.itemsize
    step, count, groups = max(1, held // SHARE // max(1, need)), max(one) + 1, []
    for begin in range(0, count, step):
        end = min(begin + step, count)
        named = f"experts {begin}–{end - 1}" if end - begin > 1 else f"expert {begin}"
        groups.append(ExpertGroup(f"block {index}, {named}", begin, end))
    return PartsPlan({item.view.name: item for item in mine if item.view is not None}, groups)
