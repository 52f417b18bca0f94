"""How long a decode step of a model takes without its quantized weights, found by running it.

The model runs with little memory: the parameters that are left in its blocks share that of a few blocks, and the
modules of weights whose bits are chosen return zeros. Its cache is made by a run without arithmetic, and then filled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmq.allocation.groups import Group
from llmq.allocation.layers import cache_bytes
from llmq.discovery.dry import without_arithmetic
from llmq.discovery.parameters import assign, shared_zeros
from llmq.errors import LlmqError, first_line
from llmq.planning.types import Plan

STEPS = 40
"""The most decode steps that are timed."""
LEAST = 5
"""Steps that are timed however long they take."""
WARM = 2
SECONDS = 5.0
"""After so many seconds no step begins."""
SHORT = 8
"""Tokens in the cache of a model that does not run without arithmetic."""
FILL = 0.01
PACKED = 4
"""A chosen weight of so many bits passes through the processor's cache where its product would be."""


def rest_of(plan: Plan, groups: Sequence[Group], device: torch.device, context: int, batch: int) -> tuple[float, int]:
    """Milliseconds of a decode step of `batch` sequences but for the weights of the groups; and the tokens in its
    cache: `context`, or fewer if the model runs without arithmetic on no more.

    The plan's model is not changed. Raises LlmqError if the model does not decode with a cache.
    """
    model: Any = deepcopy(plan.model)
    owners = [owner for owner in owners_of(plan, groups) if owner]
    try:
        with torch.no_grad():
            start = _started(model, owners, context, batch)
            _fill(plan, model, owners, device)
            seconds = _timed(model, owners, start, device)
    except LlmqError:
        raise
    except Exception as error:  # model code may fail in any way
        raise LlmqError(
            f"--target-latency: {type(model).__name__} does not decode one token after another here "
            f"({first_line(error)}), so its time cannot be found: give another budget"
        ) from error
    return 1000 * seconds, start.tokens


def owners_of(plan: Plan, groups: Sequence[Group]) -> list[str]:
    """The modules that have the weights of the groups, by their paths in the plan's model, each once."""
    found: dict[str, None] = {}
    for weight in (weight for group in groups for weight in group.weights):
        info = None if weight.block is None else plan.structure.blocks[weight.block]
        if info is None or weight.view is None:
            owner = weight.module
        elif weight.expert is not None and info.experts is not None:
            owner = f"{info.name}.{info.experts.module}"
        else:
            owner = f"{info.name}.{weight.view.parameter}".rpartition(".")[0]
        found[owner] = None
    modules = dict(plan.model.named_modules())
    return [owner for owner in found if owner in modules]


def reached(plan: Plan, module: str) -> bool:
    """Whether a decode step runs a module outside the blocks: text alone reads its parameters, or it gives logits."""
    head = getattr(plan.model, "get_output_embeddings", lambda: None)()
    modules = dict(plan.model.named_modules())
    own = {f"{module}.{name}" for name, _ in modules[module].named_parameters()} if module in modules else set()
    return (head is not None and modules.get(module) is head) or bool(own & plan.structure.outside)


@dataclass
class _Start:
    """A cache as the model's forward takes it, of some tokens, and what each owner returns in a step, in order."""

    cache: dict[str, Any]
    tokens: int
    batch: int
    outputs: dict[str, list[Any]] = field(default_factory=dict)


def _started(model: Any, owners: Sequence[str], context: int, batch: int) -> _Start:
    """See `_Start`; on the CPU, of zeros in the memory of one number, if the model runs without arithmetic."""
    with shared_zeros(model):
        try:
            with without_arithmetic():
                return _begun(model, owners, context, batch)
        except Exception:  # the model computes with values: it has to be run
            return _begun(model, owners, min(context, SHORT), batch)


def _begun(model: Any, owners: Sequence[str], context: int, batch: int) -> _Start:
    # The step that is recorded is the last token of the context.
    ids = torch.zeros(batch, max(1, context - 1), dtype=torch.long)
    start = _Start(_cache_of(model(input_ids=ids, use_cache=True)), context, batch)
    with _recorded(model, owners, start.outputs):
        start.cache = _cache_of(model(input_ids=ids[:, :1], use_cache=True, **start.cache))
    return start


def _cache_of(output: Any) -> dict[str, Any]:
    """What a model's output has for the next step, by its name among the arguments. Raises LlmqError for nothing."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    found = {name: getattr(output, name) for name in ALL_CACHE_NAMES if getattr(output, name, None) is not None}
    if not found:
        raise LlmqError("--target-latency: the model keeps no cache between tokens: give another budget")
    return found


@contextmanager
def _recorded(model: nn.Module, owners: Sequence[str], outputs: dict[str, list[Any]]) -> Iterator[None]:
    """Within the context, what each owner returns is kept, in order."""
    hooks = []
    for owner in owners:

        def note(_: nn.Module, args: Any, output: Any, owner: str = owner) -> None:
            outputs.setdefault(owner, []).append(output)

        hooks.append(model.get_submodule(owner).register_forward_hook(note))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fill(plan: Plan, model: nn.Module, owners: Sequence[str], device: torch.device) -> None:
    """Give the parameters memory of their own, but for those of the owners, which are not read.

    Blocks take the memory of others where that is long out of the processor's cache.
    """
    blocks = [block.name for block in plan.structure.blocks]
    unread = tuple(f"{owner}." for owner in owners)
    place = {f"{name}.": i for i, name in enumerate(blocks)}
    inside: dict[str, tuple[int, str]] = {}
    for name, _ in model.named_parameters():
        prefix = next((p for p in place if name.startswith(p)), None)
        if prefix is not None:
            inside[name] = place[prefix], name.removeprefix(prefix)
    kept = [0] * len(blocks)
    for name, parameter in model.named_parameters():
        if name in inside and not name.startswith(unread):
            kept[inside[name][0]] += parameter.nbytes
    apart = -(-2 * cache_bytes(device) // max(1, max(kept, default=1)))
    memory: dict[Any, Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        if name.startswith(unread):
            value = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
        else:
            index, own = inside.get(name, (0, name))
            key = (index % max(2, apart), own, parameter.shape, parameter.dtype, name in inside)
            if key not in memory:
                memory[key] = _real(parameter, device)
            value = memory[key]
        assign(model, name, value)
    for name, buffer in list(model.named_buffers()):
        assign(model, name, _real(buffer, device) if buffer.is_meta else buffer.to(device))


def _real(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of a shape and dtype in memory of its own."""
    value = FILL if like.is_floating_point() or like.is_complex() else 0
    return torch.full(like.shape, value, dtype=like.dtype, device=device)


def materialized(value: Any, device: torch.device, seen: dict[int, Any] | None = None) -> Any:
    """A cache with memory of its own for each tensor, on a device: numbers are small, all else is as it was.

    Objects, lists and dicts are changed in place.
    """
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        seen[id(value)] = _real(value, device) if value.is_floating_point() else value.to(device, copy=True)
        return seen[id(value)]
    seen[id(value)] = value
    if isinstance(value, list):
        value[:] = [materialized(one, device, seen) for one in value]
    elif isinstance(value, tuple):
        made = [materialized(one, device, seen) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    elif isinstance(value, dict):
        value.update({key: materialized(one, device, seen) for key, one in value.items()})
    elif isinstance(value, torch.device):
        return device
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not hasattr(value, "to_dict"):
        vars(value).update({key: materialized(one, device, seen) for key, one in vars(value).items()})
    return value


@dataclass
class _Stub:
    """Takes an owner's place: returns what it returned, and moves as many bytes through the cache as it would.

    On a CPU, the seconds of that are added to `excluded`, to be taken off.
    """

    outputs: Iterator[Any]
    nbytes: int
    stream: _Stream

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.stream.read(self.nbytes)
        return next(self.outputs)


class _Stream:
    """Memory that is read so that the processor's cache has in it what it has in a real step."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        size = 0 if device.type == "cuda" else min(2 * cache_bytes(device), nbytes)
        self.memory = torch.ones(size // 4)
        self.most = min(len(self.memory), cache_bytes(device) // 4)
        self.at, self.excluded = 0, 0.0

    def read(self, nbytes: int) -> None:
        """Read the next bytes, at most as many as the cache has."""
        began = time.perf_counter()
        count = min(nbytes // 4, self.most)
        if count:
            if self.at + count > len(self.memory):
                self.at = 0
            self.memory[self.at : self.at + count].sum()
            self.at += count
        self.excluded += time.perf_counter() - began


def _timed(model: Any, owners: Sequence[str], start: _Start, device: torch.device) -> float:
    """The median seconds of a step."""
    sizes = {owner: _numbers(model.get_submodule(owner)) * PACKED // 8 for owner in start.outputs}
    stream = _Stream(device, sum(sizes.values()))
    for owner, outputs in start.outputs.items():
        made = [tree_map(lambda v: _zeros(v, device) if isinstance(v, Tensor) else v, one) for one in outputs]
        model.get_submodule(owner).forward = _Stub(cycle(made), sizes[owner], stream)
    cache: Mapping[str, Any] = {name: materialized(value, device) for name, value in start.cache.items()}
    token = torch.zeros(start.batch, 1, dtype=torch.long, device=device)
    synchronize: Callable[[], object] = (
        (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    )
    times: list[float] = []
    with torch.inference_mode():
        began = time.perf_counter()
        for step in range(WARM + STEPS):
            synchronize()
            stream.excluded, at = 0.0, time.perf_counter()
            output = model(input_ids=token, use_cache=True, **cache)
            token = output.logits[:, -1:].argmax(-1)
            synchronize()
            times.append(time.perf_counter() - at - stream.excluded)
            cache = _cache_of(output)
            if step + 1 >= WARM + LEAST and time.perf_counter() - began > SECONDS:
                break
    return statistics.median(times[WARM:])


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=device)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
