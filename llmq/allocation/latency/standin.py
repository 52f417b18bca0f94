"""A model with random weights that decodes as a loaded folder would, in the memory of a few blocks.

Later blocks have the tensors of earlier ones, once these are long out of the processor's cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.allocation.groups import Group
from llmq.allocation.latency import layers
from llmq.allocation.prefill import as_loaded
from llmq.discovery.parameters import assign
from llmq.grids.scheme import Scheme
from llmq.inference.experts import use_packed
from llmq.inference.placeholders import sizes
from llmq.inference.stack import PackedStack, packed_stack
from llmq.planning.types import Plan
from llmq.planning.weights import WeightPlan

USUAL_CACHE, LARGEST_CACHE = 1 << 25, 1 << 28
SPREAD = 0.02


@dataclass(frozen=True)
class Place:
    """Where a group's weights are: a parameter of the model, by its owner's path and its name there.

    rows: of each of its matrices, one below the other; experts: how many of these lists there are.
    """

    owner: str
    parameter: str
    rows: tuple[tuple[int, int], ...]
    experts: int
    transposed: bool


@dataclass
class Standin:
    """model: in evaluation mode on its device; owners: modules whose time is that of a group's weights → the group."""

    model: nn.Module
    owners: dict[str, int] = field(default_factory=dict)

    @property
    def form(self) -> tuple[Any, ...]:
        """What the time of a step depends on: the layers' layouts, and the shapes of their tensors."""
        found: list[Any] = []
        for owner in self.owners:
            for name, module in self.model.get_submodule(owner).named_modules(prefix=owner):
                tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                told = [(key, tuple(t.shape), str(t.dtype)) for key, t in tensors]
                found.append((name, type(module).__name__, getattr(module, "layout", ""), tuple(told)))
        return tuple(found)


def standin(plan: Plan, groups: Sequence[Group], schemes: Sequence[Scheme | None], device: torch.device) -> Standin:
    """A stand-in for the plan's model with a scheme for each group. Raises LlmqError as `layers.weight` does."""
    found = Standin(as_loaded(plan.model))
    shared = _Shared([block.name for block in plan.structure.blocks], apart(plan, device))
    stacks: set[str] = set()
    given = [Group(w.name, (w,), (w.scheme,), (w.after,)) for w in given_apart(plan, groups)]
    for number, (group, scheme) in enumerate(
        zip([*groups, *given], [*schemes, *(g.candidates[0] for g in given)], strict=True)
    ):
        for place in places(plan, group):
            if number < len(groups):
                found.owners[place.owner] = number
            if scheme is not None and _put(found.model, place, scheme, plan.dtype, device, shared):
                stacks.add(place.owner)
    for owner in stacks:
        use_packed(found.model.get_submodule(owner))
    _fill(found.model, device, shared)
    return found


def given_apart(plan: Plan, groups: Sequence[Group]) -> list[WeightPlan]:
    """The weights that are quantized with a scheme of their own."""
    mine = {weight.name for group in groups for weight in group.weights}
    return [weight for weight in plan.weights if weight.scheme is not None and weight.name not in mine]


def places(plan: Plan, group: Group) -> Iterator[Place]:
    """The parameters that a group's weights are in, each once."""
    modules = dict(plan.model.named_modules())
    found: dict[str, list[WeightPlan]] = {}
    for weight in group.weights:
        found.setdefault(_parameter(plan, weight), []).append(weight)
    for name, weights in found.items():
        owner, _, parameter = name.rpartition(".")
        if owner not in modules:
            continue
        first = weights[0]
        view = first.view
        mine = [w for w in weights if w.expert == first.expert]
        rows = tuple((w.shape[0], w.shape[1]) for w in mine)
        yield Place(owner, parameter, rows, len(weights) // len(mine), view is not None and view.transposed)


def _parameter(plan: Plan, weight: WeightPlan) -> str:
    """The path of the parameter that a weight is in, or is part of."""
    info = None if weight.block is None else plan.structure.blocks[weight.block]
    if info is None or weight.view is None:
        return f"{weight.module}.weight"
    if weight.expert is not None and info.experts is not None:
        return f"{info.name}.{info.experts.module}.{weight.view.parameter}"
    return f"{info.name}.{weight.view.parameter}"


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: a GPU's L2; a CPU's largest, or 32 MiB where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if text := re.fullmatch(r"(\d+)([KM])", file.read_text().strip()):
            found.append(int(text[1]) << {"K": 10, "M": 20}[text[2]])
    return min(max(found, default=USUAL_CACHE), LARGEST_CACHE)


def apart(plan: Plan, device: torch.device) -> int:
    """How many blocks have memory of their own: as many as do not stay in the cache, of weights of two bits."""
    size = min((sum(p.numel() for p in block.module.parameters()) // 4 for block in plan.blocks), default=1)
    return min(len(plan.blocks), 1 + -(-2 * cache_bytes(device) // max(1, size)))


def nbytes(plan: Plan, device: torch.device) -> int:
    """The most memory of a stand-in's parameters."""
    every = [sum(p.nbytes for p in block.module.parameters()) for block in plan.blocks]
    return sum(p.nbytes for p in plan.model.parameters()) - sum(every) + apart(plan, device) * max(every, default=0)


@dataclass
class _Shared:
    """What is made once for blocks that are `apart` from each other. blocks: the names of all."""

    blocks: Sequence[str]
    apart: int
    made: dict[Any, Any] = field(default_factory=dict)

    def get(self, name: str, about: Any, make: Callable[[], Any]) -> Any:
        """What was made for this name in an earlier block, if that is like it in `about`, or else made now."""
        place = next((i for i, block in enumerate(self.blocks) if name.startswith(f"{block}.")), None)
        inner = name if place is None else name.removeprefix(f"{self.blocks[place]}.")
        key = (None if place is None else place % self.apart, inner, about)
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def _put(
    model: nn.Module, place: Place, scheme: Scheme, dtype: torch.dtype, device: torch.device, shared: _Shared
) -> bool:
    """Put packed weights in a parameter's place, as loading does; whether they are a stack of experts.

    Weights of a module that is no linear layer, and no stack, stay dense.
    """
    owner: Any = model.get_submodule(place.owner)
    parameter = owner.get_parameter(place.parameter)
    shape = sizes(owner)
    if shape is not None:
        bias = owner.bias is not None
        layer = shared.get(
            place.owner, (shape, bias, str(scheme)), lambda: layers.packed(shape, scheme, dtype, bias, device)
        )
        model.set_submodule(place.owner, _twin(layer))
        return False
    if parameter.dim() != 3:
        return False
    name = f"{place.owner}.{place.parameter}"

    def make() -> PackedStack:
        parts = [layers.weight(rows, scheme, dtype, device) for rows in place.rows]
        every = (parts for _ in range(place.experts))
        return packed_stack(name, tuple(parameter.shape), place.transposed, every, dtype, name)

    stack = shared.get(name, (tuple(parameter.shape), place.rows, str(scheme)), make)
    del owner._parameters[place.parameter]
    owner.register_module(place.parameter, _twin(stack))
    return True


def _twin(module: nn.Module) -> nn.Module:
    """A module of its own with the same tensors."""
    known: dict[int, Any] = {}
    for one in module.modules():
        for tensor in (*one._buffers.values(), *vars(one).values()):
            if isinstance(tensor, Tensor):
                known[id(tensor)] = tensor
        for like in getattr(one, "_like", ()):
            known[id(like)] = like
    return deepcopy(module, known)


def _fill(model: nn.Module, device: torch.device, shared: _Shared) -> None:
    """Give all parameters and buffers values, in memory that blocks share."""
    generator = torch.Generator().manual_seed(0)

    def make(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype, device=device)
        if like.dim() < 2:
            return torch.ones(like.shape, dtype=like.dtype, device=device)
        return torch.empty(like.shape).normal_(0, SPREAD, generator=generator).to(device, like.dtype)

    for name, parameter in list(model.named_parameters()):
        about = (parameter.shape, parameter.dtype)
        assign(model, name, shared.get(name, about, lambda like=parameter: make(like)))  # type: ignore[misc]
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            assign(model, name, make(buffer))
        elif buffer.device != device:
            assign(model, name, buffer.to(device))
