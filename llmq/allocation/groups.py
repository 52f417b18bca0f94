"""The weights that must have one scheme, as groups, and the schemes that each group may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from llmq.grids.scheme import Scheme
from llmq.planning.fused import families
from llmq.planning.weights import WeightPlan, matches, schemed, stored_bytes
from llmq.recipe.recipe import Recipe

EXPERTS = "the routed experts"


@dataclass(frozen=True)
class Group:
    """Weights that get one scheme.

    candidates: the schemes that it may have, by rising stored bytes; None leaves the weights as they are. nbytes: the
    stored bytes of all of its weights, by candidate.
    """

    name: str
    weights: tuple[WeightPlan, ...]
    candidates: tuple[Scheme | None, ...]
    nbytes: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """The count of its weights' values."""
        return sum(prod(weight.shape) for weight in self.weights)

    @property
    def block(self) -> int | None:
        """The block that all of its weights are in; None if they are in several, or in none."""
        found = {weight.block for weight in self.weights}
        return found.pop() if len(found) == 1 else None

    @property
    def experts(self) -> bool:
        """Whether these are the routed experts of a mixture, of all blocks: loaders read one scheme for them."""
        return self.weights[0].expert is not None


def groups_of(
    items: Sequence[WeightPlan], recipe: Recipe, candidates: Sequence[Scheme | None], dtype: torch.dtype
) -> list[Group]:
    """The groups of all weights that the recipe quantizes and gives no scheme of their own (by an override).

    Weights of which servers make one matrix are a group, unless the recipe's loader keeps them apart; so are all routed
    experts. A candidate whose group size divides not all widths of a group is left out there, unless the recipe says
    what to do then (`Recipe.ragged`).
    """
    free = [
        item
        for item in items
        if item.scheme is not None and not any(matches(pattern, item.name) for pattern, _ in recipe.overrides)
    ]
    known = {item.name for item in free}
    experts = [item for item in free if item.expert is not None]
    together = [[item for item in family if item.name in known] for family in families(items)]
    together = [family for family in together if family and family[0].expert is None]
    if recipe.loader not in ("any", "vllm"):
        together = []
    found: dict[str, list[WeightPlan]] = {}
    head = {item.name: family[0].name for family in together for item in family}
    for item in free:
        found.setdefault(EXPERTS if item.expert is not None else head.get(item.name, item.name), []).append(item)
    widths = sorted({item.shape[1] for item in experts})
    return [_group(name, weights, recipe, candidates, dtype, widths) for name, weights in found.items()]


def _group(
    name: str,
    weights: Sequence[WeightPlan],
    recipe: Recipe,
    candidates: Sequence[Scheme | None],
    dtype: torch.dtype,
    widths: Sequence[int],
) -> Group:
    sizes: dict[Scheme | None, int] = {}
    for candidate in candidates:
        if candidate is None:
            sizes[None] = sum(weight.before for weight in weights)
            continue
        asked = replace(recipe, scheme=candidate, overrides=(), keep=())
        shared = widths if weights[0].expert is not None else ()
        given = {schemed(weight, asked, dtype, shared).scheme for weight in weights}
        scheme = given.pop()
        whole = scheme is not None and all(w.shape[1] % (scheme.group_size or 1) == 0 for w in weights)
        if scheme is not None and whole and not given:
            sizes[scheme] = sum(stored_bytes(weight.shape, scheme, dtype) for weight in weights)
    if len(weights) > 1 and weights[0].expert is None:
        name = f"{name} (+ {', '.join(weight.name.rpartition('.')[2] for weight in weights[1:])})"
    order = sorted(sizes, key=lambda scheme: sizes[scheme])
    return Group(name, tuple(weights), tuple(order), tuple(sizes[scheme] for scheme in order))
