"""The plan of a rounded cache: which modules keep keys and values, and the names of their scales in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmq import formats
from llmq.discovery.blocks import Structure
from llmq.discovery.keys import Keys, dry_keys
from llmq.discovery.names import Links
from llmq.errors import LlmqError
from llmq.formats.base import Loader
from llmq.formats.compressed_tensors.cache import KEY, VALUE, rounded_by_stock, scale_shape
from llmq.grids.cache import Cache
from llmq.planning.weights import WeightPlan
from llmq.recipe.recipe import Recipe

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
NAMED = 3


@dataclass(frozen=True)
class KeysPlan:
    """A module that keeps keys and values. block: the index of its block; name: of the module in the checkpoint."""

    keys: Keys
    block: int
    name: str


@dataclass(frozen=True)
class CachePlan:
    """cache: how keys and values are rounded; modules: that keep them, in order; without: the paths of blocks that keep
    none; stock: how many of the modules stock transformers rounds too, None if it was not asked."""

    cache: Cache
    modules: tuple[KeysPlan, ...]
    without: tuple[str, ...] = ()
    stock: int | None = None

    def of(self, block: int) -> list[KeysPlan]:
        """The modules of a block."""
        return [one for one in self.modules if one.block == block]

    def stored(self, dtype: torch.dtype) -> Tensors:
        """The tensors of all scales: name → (dtype, shape)."""
        return {
            f"{one.name}.{scale}": (dtype, scale_shape(self.cache, one.keys.heads))
            for one in self.modules
            for scale in (KEY, VALUE)
        }

    @property
    def loader(self) -> Loader:
        """What is known of the tools that may read the folder, of its cache."""
        where = f"keys and values of {len(self.modules)} layers in {self.cache.told}"
        own = "stock transformers was not asked"
        if self.stock is not None:
            own = f"stock transformers computes with them rounded in {self.stock} of these layers, and saves no memory"
        if self.cache.integers:
            return Loader(f"{where}: not for vLLM, which has no int8 cache with stored scales; {own}", warn=True)
        served = formats.vllm.cache_told(self.cache)
        return Loader(
            f"{where}: {served}; {own}; llmq.load keeps them as they are where it runs the weights",
            tried=not self.cache.heads,
        )


def check_cache(recipe: Recipe, items: Sequence[WeightPlan]) -> None:
    """Raises LlmqError for a cache that the recipe's format cannot hold, or that no server of those asked for reads."""
    if recipe.cache is None:
        return
    if recipe.model_class is not None:
        raise LlmqError("--kv-cache is for models that generate text: leave out --class")
    told = formats.cache_refusal({item.scheme for item in items if item.scheme is not None})
    if told is not None:
        raise LlmqError(f"--kv-cache {recipe.kv_cache}: {told}")
    if recipe.cache.integers and recipe.loader in ("any", "vllm"):
        raise LlmqError(
            f"--kv-cache {recipe.kv_cache}: vLLM refuses a folder with stored scales for an int8 cache. Ways out: "
            f"--kv-cache {str(recipe.cache).replace('int8', 'fp8')}; no --kv-cache, and vLLM's own option "
            "--kv-cache-dtype int8_per_token_head, which needs no scales; or --loader transformers (or llmq), for "
            "a folder that vLLM is not to load"
        )


def plan_cache(recipe: Recipe, model: nn.Module, structure: Structure, links: Links) -> CachePlan | None:
    """The modules whose keys and values are rounded; None if the recipe does not ask for it.

    Raises LlmqError for models that keep no keys and values, or not in their decoder's blocks.
    """
    if recipe.cache is None:
        return None
    try:
        found = dry_keys(model)
    except LlmqError as problem:
        raise LlmqError(f"--kv-cache {recipe.kv_cache}: {problem}") from problem
    modules = []
    for keys in found:
        inside = [i for i, block in enumerate(structure.blocks) if f"{keys.module}.".startswith(f"{block.name}.")]
        if not inside:
            raise LlmqError(f"--kv-cache: {keys.module} keeps keys and values outside the decoder's blocks")
        modules.append(KeysPlan(keys, inside[0], _stored_name(model, links, keys.module)))
    having = {one.block for one in modules}
    without = tuple(block.name for i, block in enumerate(structure.blocks) if i not in having)
    return CachePlan(recipe.cache, tuple(modules), without)


def check_stock(plan: CachePlan, recipe: Recipe, models: Sequence[nn.Module], section: Mapping[str, Any]) -> CachePlan:
    """The plan with the number of modules that stock transformers rounds, too.

    models: that of the plan, and that which config.json names, if that is another; section: the folder's
    `quantization_config`. Raises LlmqError if stock transformers would not load the folder, or asks for other scales
    than are stored; not for a folder that it is not to load.
    """
    if recipe.loader == "llmq":
        return plan
    way = "--loader llmq writes the folder for servers that take the scales by their names, and for llmq.load"
    mine = {one.keys.module: scale_shape(plan.cache, one.keys.heads) for one in plan.modules}
    try:
        first, *others = [rounded_by_stock(model, section) for model in models]
    except LlmqError as problem:
        raise LlmqError(f"--kv-cache {plan.cache}: {problem}: {way}") from problem
    wrong = [(name, shape) for name, shape in first.items() if mine.get(name) != shape]
    # Another class has other paths for the same modules.
    wrong += [(name, asked[name]) for asked in others for name in list(asked)[len(first) :]]
    if wrong:
        name, shape = wrong[0]
        stored = "none" if name not in mine else f"{[*mine[name]]}"
        raise LlmqError(
            f"--kv-cache {plan.cache}: stock transformers would round the keys and values of {name} with a scale "
            f"{[*shape]}, and {stored} would be stored: {way}"
        )
    return replace(plan, stock=len(first))


def _stored_name(model: nn.Module, links: Links, module: str) -> str:
    """A module's name in the checkpoint, known from those of its parameters. Raises LlmqError."""
    for name, _ in model.get_submodule(module).named_parameters():
        for tensor in links.tensors(f"{module}.{name}"):
            if tensor.endswith(f".{name}"):
                return tensor.removesuffix(f".{name}")
    raise LlmqError(
        f"--kv-cache: the checkpoint has other names for all parameters of {module}: those of its scales are not known"
    )


def told_without(plan: CachePlan) -> list[str]:
    """A warning for the blocks that keep no keys and values."""
    if not plan.without:
        return []
    names = ", ".join(plan.without[:NAMED])
    more = f" and {len(plan.without) - NAMED} more" if len(plan.without) > NAMED else ""
    return [f"{names}{more} keep no keys and values (states, for example): nothing is rounded there by --kv-cache"]
