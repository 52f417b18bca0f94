"""Every weight with two or more axes: its scheme, or the reason why it is not quantized."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import gcd, prod

import torch
from torch import nn

from llmq import formats
from llmq.checkpoint.source import Source
from llmq.discovery.blocks import Structure
from llmq.discovery.named import Named
from llmq.discovery.names import Links
from llmq.discovery.reasons import Kind, Reason
from llmq.discovery.view import View
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.recipe.recipe import Recipe

SMALLEST_GROUP = 16
BY_USER = Reason(Kind.BY_USER, "kept by --keep")
OUTSIDE = Reason(Kind.OUTSIDE, "outside the decoder blocks")
UNREACHED = Reason(Kind.OUTSIDE, "text alone does not run its block, which attends to an image")
NOT_LOADED = "transformers does not load it: it is copied unchanged"


@dataclass(frozen=True)
class WeightPlan:
    """One weight with two or more axes, and its scheme.

    module: its path in the model; tensor: its name in the checkpoint; scheme: None if it is not quantized, for
    `reason`; before, after: stored bytes; view: its position in its block, None if no product of a block uses it;
    expert: its number, if it is a routed expert's: the view is then its position in that expert's module, or, if the
    expert cannot be run alone, in the block.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    before: int
    after: int
    scheme: Scheme | None
    reason: Reason | None = None
    block: int | None = None
    input_id: int = 0
    row_parallel: bool = False
    view: View | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The weight's name for people and patterns: the checkpoint's, without '.weight'."""
        return self.tensor.removesuffix(".weight")

    @property
    def by_user(self) -> bool:
        """Whether the user excluded it by --keep."""
        return self.reason is not None and self.reason.kind is Kind.BY_USER


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a weight: 're:' and a regular expression, a shell glob, or dotted parts of a name."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def plan_weights(
    source: Source,
    recipe: Recipe,
    model: nn.Module,
    structure: Structure,
    links: Links,
    dtype: torch.dtype,
    named: Named | None = None,
) -> list[WeightPlan]:
    """All but the stacks of routed experts (`experts.plan_experts`, `parts.plan_parts`).

    named: the class that config.json names, if it is another one: it may load tensors that the model does not.
    """
    items = []
    planned: set[str] = set()
    unreached = tuple(f"{name}." for name in structure.unreached)
    for index, block in enumerate(structure.blocks):
        for weight in block.weights:
            parameter = f"{block.name}.{weight.view.parameter}"
            planned.add(parameter)
            tensor = links.source.get(parameter)
            if tensor is None:
                sentence = links.why_apart(parameter) or "the checkpoint has no tensor for it"
                reason = Reason(Kind.NOT_STORED, sentence)
                items.append(left(parameter, parameter, (weight.rows, weight.width), dtype, reason, index))
                continue
            before = source.info(tensor).nbytes
            item = WeightPlan(
                weight.name,
                tensor,
                (weight.rows, weight.width),
                before,
                before,
                None,
                None,
                index,
                weight.input_id,
                weight.row_parallel,
                weight.view,
            )
            items.append(schemed(item, recipe, dtype))
        for parameter, reason in block.left.items():
            planned.add(parameter)
            shape = tuple(model.get_parameter(parameter).shape)
            items.append(left(parameter, links.source.get(parameter, parameter), shape, dtype, reason, index))
        if block.experts is not None:
            planned |= {f"{block.name}.{block.experts.module}.{stack}" for stack in block.experts.stacks}
        planned |= {f"{block.name}.{name}" for parts in block.parts for name in parts.names}
    for parameter, value in model.named_parameters():
        if value.dim() >= 2 and parameter not in planned:
            tensor = links.source.get(parameter, parameter)
            reason = UNREACHED if parameter.startswith(unreached) else OUTSIDE
            items.append(left(parameter, tensor, tuple(value.shape), dtype, reason, None))
    for tensor in links.unused:
        shape = source.info(tensor).shape
        if len(shape) >= 2:
            loaded = named is not None and tensor in named.parameters
            sentence = f"only {named.name} loads it: it is copied unchanged" if loaded and named else NOT_LOADED
            items.append(left(tensor, tensor, shape, dtype, Reason(Kind.NOT_LOADED, sentence), None))
    return items


def left(
    parameter: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype, reason: Reason, block: int | None
) -> WeightPlan:
    """A weight that is not quantized, for a reason."""
    size = prod(shape) * dtype.itemsize
    return WeightPlan(parameter.removesuffix(".weight"), tensor, shape, size, size, None, reason, block)


def schemed(item: WeightPlan, recipe: Recipe, dtype: torch.dtype, widths: Sequence[int] = ()) -> WeightPlan:
    """The weight with the scheme that the recipe gives it, or the reason why it has none.

    widths: of all weights that must have one scheme with it, its own among them; experts have.
    """
    scheme = recipe.scheme
    for pattern, override in recipe.overrides:
        if matches(pattern, item.name):
            scheme = override
    if any(matches(pattern, item.name) for pattern in recipe.keep):
        return replace(item, reason=BY_USER)
    rows, width = item.shape
    widths = widths or (width,)
    if scheme.rules.ragged and recipe.ragged != "keep" and any(w % scheme.rules.span for w in (width, *widths)):
        scheme = changed_scheme({"grid": scheme.rules.ragged}, scheme, item.name)
    group = scheme.rules.span or scheme.step
    ragged = [w for w in (width, *widths) if group and w % group]
    if group and ragged:
        if recipe.ragged == "error" or (one_size(scheme) and recipe.ragged != "keep"):
            return replace(item, scheme=scheme)
        if recipe.ragged == "keep":
            whose = f"its width {width}" if ragged[0] == width else f"the width {ragged[0]} of others of its expert"
            sentence = f"{'block' if scheme.rules.span else 'group'} size {group} does not divide {whose}"
            return replace(item, reason=Reason(Kind.INDIVISIBLE, sentence))
        scheme = replace(scheme, group_size=_smaller(gcd(*widths), group) if recipe.ragged == "smaller" else None)
    return replace(item, scheme=scheme, after=stored_bytes((rows, width), scheme, dtype))


def one_size(scheme: Scheme) -> bool:
    """Whether a weight whose inputs the group size does not divide can have no other: a folder of the format has one
    scheme, or the grid one size."""
    return formats.of(scheme).ONE_SCHEME or len(scheme.rules.group_sizes) == 1


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """The bytes of a weight on disk, with its scales and zero points; dtype: of scales."""
    sizes = formats.of(scheme).spec(shape, scheme, dtype)
    return sum(prod(one) * kind.itemsize for kind, one in sizes.values())


def _smaller(width: int, group: int) -> int | None:
    """The largest group size below `group` that divides the width, not under 16, or None (per channel)."""
    return next((g for g in range(group - 1, SMALLEST_GROUP - 1, -1) if width % g == 0), None)
