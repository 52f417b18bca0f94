"""A simulated cache: a model computes with keys and values as a server with a rounded cache would read them back.

No memory is saved. Scales are the folder's own, or are found as the model runs, one for each row of a batch, so that
what else is in the batch changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq import formats
from llmq.checkpoint.source import FolderSource
from llmq.discovery.blocks import build
from llmq.discovery.keys import Keys, dry_keys, watch_keys
from llmq.discovery.named import build_named
from llmq.errors import LlmqError
from llmq.formats.compressed_tensors.cache import KEY, VALUE
from llmq.formats.inspection import section_of
from llmq.grids.activations import cache_scale, round_static
from llmq.grids.cache import Cache
from llmq.inference.pretrained import check_readable

Scales = tuple[Tensor, Tensor]


def stored_scales(folder: Path, cache: Cache) -> dict[str, Scales]:
    """A folder's scales for this cache: a module's name there → those of its keys and of its values, float32; empty if
    the folder has none, or those of another cache. Raises LlmqError if its files are damaged."""
    if formats.read_cache(*section_of(folder, check_readable(folder, kernels=True))) != cache:
        return {}
    source = FolderSource(folder, trust_remote_code=True, quantized_ok=True)
    names = [name.removesuffix(f".{KEY}") for name in source.names() if name.endswith(f".{KEY}")]
    return {name: (_read(source, f"{name}.{KEY}"), _read(source, f"{name}.{VALUE}")) for name in names}


def _read(source: FolderSource, name: str) -> Tensor:
    if name not in source.names():
        raise LlmqError(f"{source.folder}: {name} is missing: write the folder again")
    return source.read(name).to(torch.float32).flatten()


def simulate(
    model: nn.Module, folder: Path, cache: Cache, stored: Mapping[str, Scales] | None = None, trust: bool = False
) -> int:
    """From now on, round what the model hands to a cache, also where it runs without one; returns in how many modules.

    folder: that the model was loaded from; stored: scales by the names of modules in the checkpoint; without them,
    every row of a batch has its own. Rounding that the model's loader has put there is switched off. Raises LlmqError
    for models that keep no keys and values, or with whose modules the scales do not agree.
    """
    # The modules of a loaded model may be others than those that its class makes.
    twin: nn.Module | None = build(folder, torch.float32, trust)
    if type(twin).__name__ != type(model).__name__:
        twin = build_named(folder, torch.float32, trust)
    if twin is None:
        raise LlmqError(f"{folder}: how its model keeps keys and values is not known")
    found = dry_keys(twin)
    scales = _matched(found, stored) if stored else {}

    def take(module: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        mine = scales.get(module, (None, None))
        return _rounded(keys, cache, mine[0]), _rounded(values, cache, mine[1])

    for one in found:
        # compressed-tensors asks each module for it before it rounds.
        vars(model.get_submodule(one.module))["quantization_enabled"] = False
    watch_keys(model, found, take, twin.config)
    return len(found)


def _rounded(x: Tensor, cache: Cache, scale: Tensor | None) -> Tensor:
    """x: [batch, heads, tokens, width]; scale: one, or one for each head."""
    if scale is None:
        scale = cache_scale(x.abs().amax((2, 3) if cache.heads else (1, 2, 3), keepdim=True), cache.grid)
    else:
        scale = scale.to(x.device).reshape(1, -1, 1, 1)
    return round_static(x, scale, cache.grid)


def _matched(found: Sequence[Keys], stored: Mapping[str, Scales]) -> dict[str, Scales]:
    """The scales of each module: those under the name of which the most last parts are its own. Raises LlmqError."""
    matched: dict[str, Scales] = {}
    taken: set[str] = set()
    for keys in found:
        shared = {name: _shared(name, keys.module) for name in stored}
        best = max(shared.values(), default=0)
        names = [name for name, count in shared.items() if count == best]
        if len(names) != 1 or not re.search(r"\d", ".".join(keys.module.split(".")[-best:])) or names[0] in taken:
            raise LlmqError(f"no scale that is stored belongs to {keys.module}: its cache cannot be simulated")
        taken.add(names[0])
        matched[keys.module] = stored[names[0]]
    return matched


def _shared(one: str, other: str) -> int:
    """The number of last parts that two dotted names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    count = 0
    for mine, theirs in pairs:
        if mine != theirs:
            break
        count += 1
    return count
