"""Every expert's weights in a plan: their schemes, and the checks that keep a loader from filling experts with noise.

What readers do with experts was tried with transformers 5.23, compressed-tensors 0.20 and vLLM 0.32: both take the
scheme of one expert for all, and transformers fills experts that it cannot read with random numbers, which it only
logs. So the experts of a folder have one scheme, one that both can read, or are not quantized at all in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from llmq import formats
from llmq.checkpoint.source import Source
from llmq.discovery.blocks import BlockInfo, Structure
from llmq.discovery.conversion import Part
from llmq.discovery.experts import ExpertsInfo, Stack
from llmq.discovery.names import Links
from llmq.discovery.pairs import Found, Pair
from llmq.discovery.parts import PartsInfo
from llmq.discovery.reasons import Kind, Reason
from llmq.discovery.view import View
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning.stacks import stacked_experts
from llmq.planning.weights import BY_USER, WeightPlan, left, matches, schemed
from llmq.recipe.recipe import Recipe

GROUP_BYTES = 2**27
GROUP_EXPERTS = 16
STACKED = Reason(Kind.STACKED, "the checkpoint stores all experts of a block in one tensor")
BESIDE = Reason(Kind.STACKED, "the checkpoint stores other matrices of the block's experts in one tensor")


@dataclass(frozen=True)
class ExpertGroup:
    """Experts begin … end − 1 of a block, which are written as one unit of this name in the sink's journal."""

    unit: str
    begin: int
    end: int


@dataclass(frozen=True)
class ExpertsPlan:
    """The routed experts of a block, which are quantized one at a time.

    weights: those of each expert, by `View.name` in its own module; index: of the block; pairs: the scale
    pairs within each expert, if a method uses them.
    """

    info: ExpertsInfo
    index: int
    weights: list[dict[str, WeightPlan]]
    groups: list[ExpertGroup]
    pairs: list[Pair]


def plan_experts(
    source: Source, recipe: Recipe, model: nn.Module, structure: Structure, links: Links, dtype: torch.dtype
) -> list[WeightPlan]:
    """The weights of all experts, one by one where the checkpoint stores them so; else a stack with the reason."""
    items: list[WeightPlan] = []
    widths = sorted(_widths(model, structure))
    for index, block in enumerate(structure.blocks):
        if block.experts is not None:
            items += of_block(source, recipe, model, block, block.experts, index, links, dtype, widths)
    return items


def _widths(model: nn.Module, structure: Structure) -> set[int]:
    """The widths of all experts' weights: their one scheme must have a group size that divides all of them."""
    return {
        model.get_parameter(f"{block.name}.{block.experts.module}.{name}").shape[1 if stack.axis == 0 else 2]
        for block in structure.blocks
        if block.experts is not None
        for name, stack in block.experts.stacks.items()
    }


def of_block(
    source: Source,
    recipe: Recipe,
    model: nn.Module,
    block: BlockInfo,
    experts: ExpertsInfo | PartsInfo,
    index: int,
    links: Links,
    dtype: torch.dtype,
    widths: list[int],
) -> Iterator[WeightPlan]:
    """The weights of a block's experts, their views those in one expert; a stack with the reason if it is left alone.

    widths: of all experts' weights of the model.
    """
    base = 1 + max((w.input_id for w in block.weights), default=-1)
    found: list[WeightPlan] = []
    for name, stack in experts.stacks.items():
        parameter = f"{block.name}.{experts.module}.{name}"
        shape = tuple(model.get_parameter(parameter).shape)
        pieces = [(p.tensor, _place(name, shape, p.part, stack)) for p in links.slices.get(parameter, ())]
        if not pieces or not all(place for _, place in pieces):
            tensor = links.source.get(parameter, parameter)
            whole = [p for p in links.slices.get(parameter, ()) if len(p.part.shape) == len(shape)]
            if recipe.loader == "llmq" and len(links.tensors(parameter)) in (1, len(whole)):
                stored, first = parameter if whole[1:] else links.tensors(parameter)[0], base + stack.input_id
                found += stacked_experts(recipe, block, experts, index, name, stored, shape, first, dtype, widths)
                continue
            by_user = any(matches(p, tensor.removesuffix(".weight")) for p in recipe.keep)
            reason = BY_USER if by_user else STACKED
            found.append(left(parameter, tensor, shape, dtype, reason, index))
            continue
        for tensor, place in pieces:
            assert place is not None
            expert, view = place
            info = source.info(tensor)
            item = WeightPlan(
                tensor.removesuffix(".weight"),
                tensor,
                tuple(info.shape),
                info.nbytes,
                info.nbytes,
                None,
                None,
                index,
                base + expert * len(experts.stacks) + stack.input_id,
                stack.row_parallel,
                view,
                expert,
            )
            found.append(schemed(item, recipe, dtype, widths))
    if any(item.expert is None for item in found):
        # Packed experts beside a stack: stock transformers would not find them.
        found = [item if item.scheme is None else replace(item, scheme=None, reason=BESIDE) for item in found]
        if not all(item.by_user for item in found):
            return iter(found)
    if all(item.scheme is None for item in found):
        return _joined(found, block, experts, links, dtype)
    return iter(found)


def _place(name: str, shape: tuple[int, ...], part: Part, stack: Stack) -> tuple[int, View] | None:
    """The expert that a stored matrix belongs to, and its view in this expert's module."""
    _, rows, columns = shape
    expert, rest = divmod(part.offset, rows * columns)
    transposed = stack.axis == 0
    if len(part.shape) != 2 or part.stride != ((1, columns) if transposed else (columns, 1)):
        return None
    first, odd = (rest, 0) if transposed else divmod(rest, columns)
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    if odd or part.shape[1] != inputs:
        return None
    span = None if part.shape[0] == outputs else (first, first + part.shape[0])
    return expert, View(name, None, span, transposed)


def _joined(
    items: list[WeightPlan], block: BlockInfo, experts: ExpertsInfo | PartsInfo, links: Links, dtype: torch.dtype
) -> Iterator[WeightPlan]:
    """The stacks of a block whose experts are left alone: each is written as one tensor, under the model's name.

    transformers makes packed experts of any tensors that are named one by one.
    """
    for name in experts.stacks:
        parameter = f"{block.name}.{experts.module}.{name}"
        mine = [item for item in items if item.tensor in links.tensors(parameter) or item.module == parameter]
        first = mine[0]
        size = sum(prod(item.shape) for item in mine) * dtype.itemsize
        whole = len(mine) == 1 and first.expert is None
        shape = first.shape if whole else (len(mine), *first.shape)
        tensor = first.tensor if whole else parameter
        yield replace(
            first, module=parameter, tensor=tensor, shape=shape, before=size, after=size, view=None, expert=None
        )


def group(index: int, info: ExpertsInfo, items: list[WeightPlan], found: Found | None = None) -> ExpertsPlan | None:
    """The plan of a block's experts; None if they are not quantized. items: of the block."""
    weights: list[dict[str, WeightPlan]] = [{} for _ in range(info.count)]
    for item in items:
        if item.expert is not None and item.view is not None and item.scheme is not None:
            weights[item.expert][item.view.name] = item
    if not any(weights):
        return None
    size = max(sum(item.after for item in mine.values()) for mine in weights)
    step = max(1, min(GROUP_EXPERTS, GROUP_BYTES // max(1, size)))
    groups = []
    for begin in range(0, info.count, step):
        end = min(begin + step, info.count)
        named = f"experts {begin}–{end - 1}" if end - begin > 1 else f"expert {begin}"
        groups.append(ExpertGroup(f"block {index}, {named}", begin, end))
    return ExpertsPlan(info, index, weights, groups, [] if found is None else found.experts[0])


def check_experts(items: list[WeightPlan], recipe: Recipe, alone: bool = False) -> None:
    """Raises LlmqError if loaders could not read the experts as they would be written, or would read them wrong.

    alone: whether only llmq is to read them (`stacks`).
    """
    mine = [i for i in items if i.expert is not None]
    stacked = [i for i in items if i.reason is not None and i.reason.kind is Kind.STACKED]
    if stacked and recipe.loader == "llmq":
        raise LlmqError(
            f"{stacked[0].name}: {stacked[0].reason}, and they are packed all or not at all. Way out: --keep "
            f"{_pattern(stacked, items)}"
        )
    if stacked:
        raise LlmqError(
            f"{stacked[0].name}: {stacked[0].reason}; stock transformers cannot load such experts packed, and would "
            f"fill them with random numbers. Ways out: --loader llmq, for a folder that only llmq loads; --keep "
            f"{_pattern(stacked, items)} quantizes everything else"
        )
    schemes: dict[Scheme | None, WeightPlan] = {}
    for item in mine:
        schemes.setdefault(item.scheme, item)
    if len(schemes) > 1:
        told = ", ".join(f"{item.name} {scheme or 'not quantized'}" for scheme, item in schemes.items())
        raise LlmqError(
            f"experts with different schemes: {told}. transformers and vLLM take the scheme of one expert for all, and "
            f"load the others as noise or not at all. Ways out: {_even(mine, recipe)}patterns that match every expert, "
            "or --keep for all experts of a block"
        )
    for scheme, item in schemes.items():
        static = scheme is not None and scheme.activations is not None and not scheme.activations.dynamic
        if static and item.view is not None and item.view.index is not None:
            raise LlmqError(
                f"{item.name}: static scales need inputs of every expert, and the model's code runs such an expert on "
                f"the tokens that chose it only: --activations dynamic, or --keep {_pattern(mine, items)}"
            )
        served = formats.served_refusal if recipe.loader == "vllm" else formats.experts_refusal
        why = None if scheme is None else (formats.stacks_refusal if alone else served)(scheme)
        if scheme is not None and why:
            also = not alone and recipe.loader != "vllm" and formats.served_refusal(scheme) is None
            way = ", or --loader vllm for a folder that vLLM and llmq.load read" if also else ""
            raise LlmqError(f"{item.name}: {why}{way}, or --keep {_pattern(mine, items)} to leave the experts alone")


def check_route(items: list[WeightPlan], recipe: Recipe, calibrated: bool) -> list[str]:
    """What to warn of if each expert is to be calibrated with all tokens (`Recipe.route`).

    calibrated: whether calibration data is used at all. Raises LlmqError if it is not, or if experts cannot be run one
    at a time (`parts`).
    """
    if recipe.route == "own":
        return []
    if not calibrated:
        raise LlmqError(
            f"--route all: method {'+'.join(recipe.methods)!r} uses no calibration tokens: leave --route out, or "
            "choose a method that does, such as gptq"
        )
    mine = [item for item in items if item.expert is not None and item.scheme is not None]
    within = next((item for item in mine if item.view is not None and item.view.index is not None), None)
    if within is not None:
        raise LlmqError(
            f"--route all: {within.name}: the model's code cannot run such an expert on tokens that did not choose it: "
            "leave --route out"
        )
    if mine:
        return []
    return ["--route all changes nothing here: no routed experts are quantized one by one"]


def _even(experts: list[WeightPlan], recipe: Recipe) -> str:
    """The way out where --ragged gives experts' matrices of different widths different schemes; empty elsewhere."""
    size, widths = recipe.scheme.group_size, sorted({item.shape[1] for item in experts})
    if not size or all(width % size == 0 for width in widths):
        return ""
    return f"a --group-size that divides {' and '.join(map(str, widths))}, "


def _pattern(experts: list[WeightPlan], items: list[WeightPlan]) -> str:
    """Parts of the names of all experts, as --keep takes them, and of as few other weights' names as there are."""
    parts = [set(item.name.split(".")) for item in experts]
    # A number is that of a block or of an expert, a single letter the mark of a transposed matrix.
    words = [p for p in experts[0].name.split(".") if len(p) > 1 and not p.isdigit()]
    common = [p for p in words if all(p in mine for mine in parts)]
    mine = {item.name for item in experts}
    others = [item.name for item in items if item.scheme is not None and item.name not in mine]

    def wrong(part: str) -> int:
        return sum(matches(part, name) for name in others)

    best = min(reversed(common), key=wrong, default=experts[0].name)
    dense = {item.name for item in items if item.expert is None}
    if not any(matches(best, name) for name in others if name in dense):
        return best
    # Experts in several places, whose names have nothing of their own in common.
    each = (
        min((p for p in reversed(item.name.split(".")) if len(p) > 1 and not p.isdigit()), key=wrong)
        for item in experts
    )
    return " --keep ".join(dict.fromkeys(each))
