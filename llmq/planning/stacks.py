"""Experts that the checkpoint stores as stacks: each is written by its own names, which only `llmq.load` knows.

Stock transformers has no rule that joins packed experts to such a parameter: it would fill it with random numbers. So
they are written only with `--loader llmq`, and the folder's configuration is one that other loaders refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from llmq.discovery.blocks import BlockInfo
from llmq.discovery.experts import ExpertsInfo
from llmq.discovery.parts import PartsInfo
from llmq.discovery.view import View
from llmq.formats.stacks import stem
from llmq.planning.weights import BY_USER, WeightPlan, left, matches, schemed
from llmq.recipe.recipe import Recipe


def stacked_experts(
    recipe: Recipe,
    block: BlockInfo,
    experts: ExpertsInfo | PartsInfo,
    index: int,
    name: str,
    tensor: str,
    shape: tuple[int, ...],
    inputs: int,
    dtype: torch.dtype,
    widths: list[int],
) -> Iterator[WeightPlan]:
    """The weights of a stack's experts; the stack as a whole if the user keeps all of them.

    name: of the parameter in the module of the experts; tensor: the stored one; shape: [experts, ...], or of two axes
    if the experts' matrices lie one below the other; inputs: the `input_id` of the first expert's weight.
    """
    parameter = f"{block.name}.{experts.module}.{name}"
    if any(matches(pattern, tensor.removesuffix(".weight")) for pattern in recipe.keep):
        yield left(parameter, tensor, shape, dtype, BY_USER, index)
        return
    stack = experts.stacks[name]
    # The checkpoint's name, where it is the parameter's, is one that every class which loads it understands.
    holder, _, leaf = tensor.rpartition(".")
    holder = holder if leaf == name else f"{block.name}.{experts.module}"
    count, *matrix = shape if stack.count is None else (stack.count, shape[0] // stack.count, shape[1])
    out, inside = matrix if stack.axis == 1 else reversed(matrix)
    size = out * inside * dtype.itemsize
    items = []
    for expert in range(count):
        stored = stem(holder, name, expert, stack.axis == 0)
        view = View(name, transposed=stack.axis == 0)
        fed = inputs + expert * len(experts.stacks)
        item = WeightPlan(
            stored,
            f"{stored}.weight",
            (out, inside),
            size,
            size,
            None,
            None,
            index,
            fed,
            stack.row_parallel,
            view,
            expert,
        )
        items.append(schemed(item, recipe, dtype, widths))
    reason = items[0].reason
    if reason is not None and all(item.scheme is None for item in items):
        yield left(parameter, tensor, shape, dtype, reason, index)
        return
    yield from items


def for_llmq_alone(items: Iterable[WeightPlan], stored: Iterable[str]) -> bool:
    """Whether some of the weights are parts of what the checkpoint stores as one. stored: the checkpoint's names."""
    names = set(stored)
    return any(item.expert is not None and item.scheme is not None and item.tensor not in names for item in items)
