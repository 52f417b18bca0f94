"""Run a block on random hidden states with some parameters changed, and observe the inputs of its matrix products.

Every channel gets a different factor. If an input column of a product is multiplied by the same factor for every token,
the channel with that factor feeds this column.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.calls import Call
from llmq.discovery.handed import containers
from llmq.discovery.matmuls import watch_matmuls
from llmq.discovery.parameters import swapped

SAMPLES = 32  # tokens: so many that few channels behind a ReLU are zero for all of them
MAX_SAMPLES = 512  # tokens if some are: a few activations keep one channel in twenty
SEQUENCES = 4  # at least: fused projections are found on the first token of each
SAME = 1e-4  # relative: above float32's rounding noise of a block, far below the effect of a wrong factor


class Unsteady(Exception):
    """The block gives another result, or runs other products, when it is run again."""


@dataclass
class Use:
    """A product with a parameter: its input, float32 [samples, width]; the other fields as in matmuls.Matmul."""

    parameter: str
    input: Tensor
    whole: bool
    chosen: bool
    axis: int | None


@dataclass
class Run:
    """Products in order, and every floating tensor that the block returns or writes to its call's dicts and lists."""

    uses: list[Use]
    output: list[Tensor]

    def difference(self, other: Run) -> float:
        """The largest relative difference ‖a − b‖ / ‖b‖ of the outputs; infinite if their number or shapes differ."""
        if len(self.output) != len(other.output):
            return float("inf")
        return max((difference(a, b) for a, b in zip(self.output, other.output, strict=True)), default=0.0)

    def path(self) -> list[tuple[str, torch.Size]]:
        """The parameters used and the shapes of their inputs."""
        return [(use.parameter, use.input.shape) for use in self.uses]


def difference(value: Tensor, base: Tensor) -> float:
    """‖value − base‖ / ‖base‖, infinite where the shapes differ or a value is not finite."""
    if value.shape != base.shape:
        return float("inf")
    difference = float((value.detach().double() - base.detach().double()).norm())
    norm = float(base.detach().double().norm())
    if not difference < float("inf"):
        return float("inf")
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


class Bench:
    """A block, one call of it, and random hidden states; parameters are changed for one run at a time.

    The block's parameters are float32. The call stays unchanged: its dicts and lists are copied for every run. Raises
    Unsteady, and whatever the block raises.
    """

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor, seed: int = 0) -> None:
        self.block, self.generator = block, torch.Generator().manual_seed(seed)
        self.call = replace(call, args=self._ready(call.args), kwargs=self._ready(call.kwargs), element=None)
        self.tokens = hidden.shape[-2]
        self.hidden: list[Tensor]
        self.base: Run
        count = max(SEQUENCES, -(-SAMPLES * hidden.shape[-1] // hidden.numel()))
        self._sample(hidden.shape, count)
        first = self.hidden, self.base
        while self._dead():
            count *= 2
            if count * hidden.numel() > MAX_SAMPLES * hidden.shape[-1]:
                self.hidden, self.base = first
                break
            self._sample(hidden.shape, count)
        again = self.run()
        if again.path() != self.base.path() or again.difference(self.base) > SAME:
            raise Unsteady("two runs of the block on the same input differ")

    def _sample(self, shape: torch.Size, count: int) -> None:
        self.hidden = [self._noise(shape) for _ in range(count)]
        if len(shape) >= 3 and shape[-3] == 1:
            self._batch()
        self.base = self.run()

    def _dead(self) -> bool:
        """Whether some input column is almost always zero while others are not."""
        alive = [_alive(use.input) for use in self.base.uses if use.input.shape[0] >= self.tokens]
        return any(bool(some.any()) and not bool(some.all()) for some in alive)

    def run(self, values: Mapping[str, Tensor] | None = None) -> Run:
        """The block with other values for some parameters, on every hidden state. Raises Unsteady."""
        with swapped(self.block, values or {}):
            runs = [self._one(hidden) for hidden in self.hidden]
        return runs[0] if len(runs) == 1 else _joined(runs)

    def _one(self, hidden: Tensor) -> Run:
        call = replace(self.call, args=_fresh(self.call.args), kwargs=_fresh(self.call.kwargs))
        with watch_matmuls(self.block) as seen:
            result = call.run(self.block, hidden.clone())
        uses = [
            Use(m.parameter, m.input.reshape(-1, m.input.shape[-1]), m.whole, m.chosen, m.axis)
            for m in seen
            if m.input is not None
        ]
        return Run(uses, list(_floats((result, containers(call.args, call.kwargs)))))

    def random(self, count: int) -> Tensor:
        """Uniform factors in [0.5, 1.5], float32 [count]."""
        return torch.rand(count, generator=self.generator) + 0.5

    def distinct(self, count: int) -> Tensor:
        """Factors in [0.5, 0.9] and [1.1, 1.5], evenly spaced, none near 1, in random order: float32 [count]."""
        factors = torch.linspace(0.5, 1.3, count)
        factors = torch.where(factors > 0.9, factors + 0.2, factors)
        return factors[torch.randperm(count, generator=self.generator)]

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _ready(self, value: Any) -> Any:
        # The run on zeros recorded zeros in place of real values: such tensors are replaced by noise.
        def ready(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            empty = tensor.numel() > 1 and not bool(tensor.any())
            return self._noise(tensor.shape) if empty else tensor.float()

        return _mapped(value, ready)

    def _batch(self) -> None:
        # One run of several sequences reads the weights once, but a call's arguments may not fit another batch size.
        together = torch.cat(self.hidden, -3)
        try:
            output = self._one(together).output[0]
            parts = output.chunk(len(self.hidden), -3)
        except Exception:  # model code may fail in any way on another batch size
            return
        singles = [self._one(hidden).output[0] for hidden in self.hidden]
        if all(difference(part, single) <= SAME for part, single in zip(parts, singles, strict=True)):
            self.hidden = [together]


def _joined(runs: list[Run]) -> Run:
    names = [[use.parameter for use in run.uses] for run in runs]
    if any(n != names[0] for n in names) or len({len(run.output) for run in runs}) > 1:
        raise Unsteady("which products the block makes depends on its input")
    products = zip(*(run.uses for run in runs), strict=True)
    uses = [replace(same[0], input=torch.cat([use.input for use in same])) for same in products]
    output = [torch.stack(same) for same in zip(*(run.output for run in runs), strict=True)]
    return Run(uses, output)


@contextmanager
def unchanged(calls: list[Call]) -> Iterator[None]:
    """Restore the calls' dicts and lists afterwards, removing what blocks wrote to them."""
    held = {id(c): c for call in calls for c in containers(call.args, call.kwargs)}
    before = {key: copy.copy(container) for key, container in held.items()}
    try:
        yield
    finally:
        for key, container in held.items():
            container.clear()
            (container.update if isinstance(container, MutableMapping) else container.extend)(before[key])


def run_to_fill(block: nn.Module, call: Call, hidden: Tensor, seed: int = 0) -> None:
    """Run a block once so that it writes what later blocks need to the call's dicts and lists, if there are any."""
    if not containers(call.args, call.kwargs):
        return
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))

    def ready(value: Any) -> Any:
        return value if isinstance(value, (MutableMapping, list)) else _mapped(value, _float)

    args, kwargs = tuple(map(ready, call.args)), {key: ready(value) for key, value in call.kwargs.items()}
    with torch.inference_mode():
        replace(call, args=args, kwargs=kwargs).run(block, noise)


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with `change` applied to its tensors; every dict and list in it is copied."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, part in value.items():
            made[key] = _mapped(part, change)
        return made
    if isinstance(value, (tuple, list)):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _fresh(value: Any) -> Any:
    return _mapped(value, Tensor.clone)


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(part)


def _alive(x: Tensor) -> Tensor:
    """Columns that more than one sample leaves nonzero (ReLU): with a single sample any factor would fit."""
    if not len(x):  # an expert that no sample chose
        return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return (x.abs() > 1e-3 * x.abs().amax(0)).sum(0) > 1


def followed(base: Tensor, new: Tensor, factors: Tensor) -> Tensor:
    """The index of the factor that each column of a product's input was multiplied by, int64 [width]; −1 if none.

    base, new: the input without and with the factors, [samples, width]; factors: [channels], distinct.
    """
    old, now = base.double(), new.double()
    squares = old.square().sum(0)
    ratio = (old * now).sum(0) / squares.clamp_min(1e-300)
    rest = (now - ratio * old).square().sum(0)
    steady = _alive(old) & (squares > 1e-20) & (rest <= SAME**2 * squares)
    ordered, order = factors.double().sort()
    after = torch.searchsorted(ordered, ratio).clamp(0, len(ordered) - 1)
    before = (after - 1).clamp_min(0)
    nearest = torch.where((ordered[after] - ratio).abs() < (ratio - ordered[before]).abs(), after, before)
    spacing = float(ordered.diff().min()) if len(ordered) > 1 else 1e-3
    close = (ordered[nearest] - ratio).abs() <= min(spacing / 4, 1e-3)
    return torch.where(steady & close, order[nearest], -1)
