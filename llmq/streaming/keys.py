"""The largest keys and values of a quantized block, seen while its output for the calibration windows is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmq import ranks
from llmq.discovery.keys import at_keys
from llmq.formats.compressed_tensors.cache import KEY, VALUE, stored
from llmq.grids.activations import cache_scale
from llmq.planning.plan import BlockPlan, Plan


@dataclass
class Largest:
    """The largest magnitudes of each head: by a module's path, float32 [heads] of its keys and of its values."""

    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def see(self, module: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Count keys and values [batch, heads, tokens, width]; returns them."""
        new = tuple(one.detach().abs().amax((0, 2, 3)).float().cpu() for one in (keys, values))
        old = self.found.get(module, new)
        self.found[module] = torch.maximum(old[0], new[0]), torch.maximum(old[1], new[1])
        return keys, values

    def merge(self, every: Sequence[dict[str, tuple[Tensor, Tensor]]]) -> None:
        """Count what other ranks saw."""
        for found in every:
            for module, (keys, values) in found.items():
                old = self.found.get(module, (keys, values))
                self.found[module] = torch.maximum(old[0], keys), torch.maximum(old[1], values)


@contextmanager
def largest(plan: Plan, block: BlockPlan) -> Iterator[Largest]:
    """Within the context, what runs of a block hand to a cache is counted, if the plan rounds it."""
    seen = Largest()
    mine = [] if plan.cache is None else plan.cache.of(block.index)
    inside = [replace(one.keys, module=_within(block, one.keys.module)) for one in mine]
    with at_keys(block.module, inside, seen.see, plan.model.config):
        yield seen
    if inside:
        seen.merge(ranks.everyone(seen.found))


def scales(plan: Plan, block: BlockPlan, seen: Largest) -> dict[str, Tensor]:
    """The tensors of a block's scales: name → scale, in the model's dtype; none if the plan has no cache."""
    if plan.cache is None:
        return {}
    cache, made = plan.cache.cache, dict[str, Tensor]()
    for one in plan.cache.of(block.index):
        heads = seen.found[_within(block, one.keys.module)]
        keys, values = (cache_scale(top if cache.heads else top.max().reshape(1), cache.grid) for top in heads)
        made |= stored(one.name, cache, keys, values, plan.dtype)
    return made


def _within(block: BlockPlan, module: str) -> str:
    """A module's path in its block; '' for the block itself."""
    return module.removeprefix(block.name).removeprefix(".")


def told(scales: Mapping[str, Tensor]) -> dict[str, tuple[list[float], ...]]:
    """For the journal: a module's name → its scales of keys, and of values."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in scales)
    return {
        name: tuple(scales[f"{name}.{part}"].float().flatten().tolist() for part in (KEY, VALUE)) for name in modules
    }
