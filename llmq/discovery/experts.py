"""A block's routed experts, found by how they are called, and run one at a time.

The module of the experts is called with rows [T, H], the experts that each row chose (integers [T, k]) and their
weights (floats [T, k]), and returns rows [T, H]. Its parameters have one entry per expert along their first axis. With
the entries of one expert alone, and calls in which every row chooses that one, it computes what this expert computes:
Σ_e weight_e · expert_e(x) is the module's output. That is tried here, so that an expert can be quantized as a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.calls import Call
from llmq.discovery.matmuls import watch_matmuls
from llmq.discovery.parameters import assign

ROWS = 6
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Stack:
    """A parameter [experts, ...] of an experts' module: the matrices of all experts.

    axis: the axis of an entry that a product sums over: 1, or 0 if it is stored as [in, out]; input_id: the same for
    stacks that are fed by the same tensor; row_parallel: whether that is not the module's own input; count: of matrices
    in a parameter of two axes, one below the other; None if it has a third one.
    """

    axis: int
    input_id: int
    row_parallel: bool
    count: int | None = None


@dataclass(frozen=True)
class ExpertsInfo:
    """The routed experts of a block.

    module: their module's path in the block; count: their number; stacks: by name within the module; parameters: all
    parameters of the module with an entry per expert, biases too; call: their module's call: places of rows, choices
    and weights among its arguments.
    """

    module: str
    count: int
    stacks: dict[str, Stack]
    parameters: tuple[str, ...]
    call: Places


@dataclass(frozen=True)
class Places:
    """Where the rows, the choices and the weights are among the arguments of an experts' module.

    width: of its rows; chosen: how many experts each row chooses.
    """

    rows: int | str
    choices: int | str
    weights: int | str
    width: int
    chosen: int

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed:
        """The three tensors of a call."""

        def at(place: int | str) -> Tensor:
            value: Tensor = args[place] if isinstance(place, int) else kwargs[place]
            return value

        return Routed(at(self.rows), at(self.choices), at(self.weights))

    def call(self, routed: Routed) -> Call:
        """A call with these choices and weights, for rows to be given."""
        values = {self.rows: None, self.choices: routed.choices, self.weights: routed.weights}
        args = tuple(values[i] for i in sorted(place for place in values if isinstance(place, int)))
        kwargs = {place: value for place, value in values.items() if isinstance(place, str) and place != self.rows}
        return Call(args, kwargs, self.rows, None)


@dataclass
class Routed:
    """The arguments of an experts' module: rows [T, H], choices int64 [T, k], weights [T, k]."""

    rows: Tensor
    choices: Tensor
    weights: Tensor


def places_of(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Places | None:
    """The places of rows, choices and weights, if a module was called like experts; else None."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    tensors = {place: value for place, value in given.items() if isinstance(value, Tensor)}
    if len(tensors) != 3 or len(tensors) != len([v for v in given.values() if v is not None]):
        return None
    if not isinstance(output, Tensor) or output.dim() != 2:
        return None
    whole = [p for p, v in tensors.items() if not v.is_floating_point() and v.dim() == 2 and v.dtype != torch.bool]
    if len(whole) != 1:
        return None
    choices = tensors[whole[0]]
    rows = [p for p, v in tensors.items() if v.is_floating_point() and v.shape == output.shape]
    others = {p: v for p, v in tensors.items() if v.is_floating_point() and p not in rows[:1]}
    weights = [p for p, v in others.items() if v.shape == choices.shape]
    if len(rows) != 1 or len(weights) != 1 or len(choices) != len(output):
        return None
    return Places(rows[0], whole[0], weights[0], output.shape[1], choices.shape[1])


@contextmanager
def watch_experts(
    block: nn.Module, noticed: Callable[[Routed, Tensor], object] = lambda routed, output: None
) -> Iterator[dict[str, list[Places]]]:
    """Within the context, records which modules of a block are called like experts: path in the block → every call.

    noticed: is called with the tensors and the output of every such call.
    """
    seen: dict[str, list[Places]] = {}
    hooks = []
    for name, module in block.named_modules():
        if name and any(p.dim() >= 3 for p in module.parameters(recurse=False)):

            def note(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                places = places_of(args, kwargs, output)
                if places is not None:
                    seen.setdefault(name, []).append(places)
                    noticed(places.of(args, kwargs), output)

            hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def describe(block: nn.Module, name: str, places: Places) -> ExpertsInfo | str:
    """The experts of a module of a block, or why they cannot be run one at a time."""
    module = block.get_submodule(name)
    sizes = {p.shape[0] for p in module.parameters() if p.dim() >= 3}
    if len(sizes) != 1:
        return f"its stacks have {' and '.join(map(str, sorted(sizes)))} experts"
    count = sizes.pop()
    parameters = tuple(n for n, p in module.named_parameters(recurse=False) if p.dim() >= 2 and p.shape[0] == count)
    try:
        stacks, apart = _tried(module, parameters, places, count)
    except Exception as error:  # the module's code may fail in any way on one expert alone
        return f"one expert alone cannot be run ({type(error).__name__})"
    if not apart <= TOLERANCE:
        return "its output is not the weighted sum of what its experts compute"
    if {n for n in parameters if module.get_parameter(n).dim() >= 3} != set(stacks):
        return "not every stack is used as one matrix per expert"
    return ExpertsInfo(name, count, stacks, parameters, places)


def _tried(
    module: nn.Module, parameters: tuple[str, ...], places: Places, count: int
) -> tuple[dict[str, Stack], float]:
    """The stacks that one expert alone uses, and how far the weighted sum of experts is from the module's output.

    All experts have the same random values, so that there is only one of them in memory.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {n: tuple(p.shape[1:]) for n, p in module.named_parameters() if n in parameters}
    before = {n: p.data for n, p in module.named_parameters()}
    values = {n: torch.randn(shapes.get(n, p.shape), generator=generator) for n, p in before.items()}
    values = {n: v / max(1, v.shape[-1]) ** 0.5 for n, v in values.items()}
    x = torch.randn(ROWS, places.width, generator=generator)
    chosen = min(2, count)
    choices = torch.stack([torch.randperm(count, generator=generator)[:chosen] for _ in range(ROWS)])
    weights = torch.rand(ROWS, chosen, generator=generator)
    try:
        with torch.no_grad():
            for name, value in values.items():
                assign(module, name, value.expand(count, *value.shape) if name in shapes else value)
            together = places.call(Routed(x, choices, weights)).run(module, x)
            expert = Expert(module, places, {name: values[name] for name in parameters})
            with watch_matmuls(expert) as matmuls:
                alone = expert(x)
    finally:
        for name, data in before.items():
            assign(module, name, data)
    summed = alone * weights.sum(1, keepdim=True)
    apart = float((together - summed).norm() / summed.norm().clamp_min(1e-30))
    stacks: dict[str, Stack] = {}
    inputs: dict[int, int] = {}
    for name in parameters:
        uses = [m for m in matmuls if m.parameter == name]
        if len(uses) != 1 or len(shapes[name]) != 2 or uses[0].part[1] != values[name].numel():
            continue
        fed, axis = uses[0].input, uses[0].axis
        if fed is not None and axis is not None:
            own = fed.numel() == x.numel() and torch.equal(fed.reshape(x.shape), x)
            input_id = inputs.setdefault(fed.untyped_storage().data_ptr(), len(inputs))
            stacks[name] = Stack(axis, input_id, row_parallel=not own)
    return stacks, apart


class Expert(nn.Module):
    """One expert of an experts' module: its parameters are this expert's entries, its input and output rows [n, width].

    The module of all experts computes it, with these entries in place of its stacks, and every row choosing it.
    """

    def __init__(self, experts: nn.Module, places: Places, entries: Mapping[str, Tensor]) -> None:
        super().__init__()
        # In a tuple, so that the module of all experts is no part of this one.
        self._experts, self._places = (experts,), places
        self.width = places.width
        for name, value in entries.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, rows: Tensor) -> Tensor:
        """What the expert computes of rows [n, width]."""
        experts, choices = self._experts[0], torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        weights = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
        before = {name: experts._parameters[name] for name in self._parameters}
        try:
            for name in before:
                experts._parameters[name] = getattr(self, name)[None]
            # The class's own forward: that of the module may be replaced for the time (`instead`).
            call = self._places.call(Routed(rows, choices, weights))
            return call.run(partial(type(experts).forward, experts), rows)
        finally:
            experts._parameters.update(before)


ALONE = Call((None,), {}, 0, None)
"""The call of an Expert."""


@contextmanager
def instead(block: nn.Module, experts: ExpertsInfo, function: Callable[[Routed], Tensor]) -> Iterator[None]:
    """Within the context, the block's experts return what a function of their call's tensors returns."""
    module = block.get_submodule(experts.module)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return function(experts.call.of(args, kwargs))

    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
