"""What is added to the outputs of weights: the residual streams that they write to, found while a block runs.

The output of a product is followed through what does not change its values (views, copies), through factors, and
through sums. A tensor that it is added to counts if it was there before the product: the block's input for the last
weight of attention, the stream behind attention for the last weight of an MLP. What is computed later and added, such
as an MLP beside attention that reads the same input, is not known yet when the weight is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from llmq.discovery.inputs import at_products
from llmq.discovery.matmuls import PRODUCTS, flat
from llmq.discovery.replay import Replay
from llmq.discovery.view import View

_TENSOR = torch.Tensor
SUMS = {torch.add, _TENSOR.add, _TENSOR.__add__, _TENSOR.__radd__, _TENSOR.add_, _TENSOR.__iadd__}
FACTORS = {torch.mul, _TENSOR.mul, _TENSOR.__mul__, _TENSOR.__rmul__, _TENSOR.mul_, _TENSOR.__imul__}
COPIES = {
    torch.clone,
    torch.dropout,
    torch.nn.functional.dropout,
    torch.reshape,
    _TENSOR.bfloat16,
    _TENSOR.clone,
    _TENSOR.contiguous,
    _TENSOR.double,
    _TENSOR.float,
    _TENSOR.half,
    _TENSOR.reshape,
    _TENSOR.to,
    _TENSOR.type,
    _TENSOR.type_as,
}

COMPARED = 16
"""How many rows of an output are looked at to see whether they are where they were."""


@dataclass
class Seen:
    """What a run of a block shows of a weight.

    inputs: its input at every product, [..., in]; addends: what its output is added to, each [tokens, out], divided by
    the factor of the output in that sum; products: how often it was used; first: its place in the order in
    which weights are first used.
    """

    inputs: list[Tensor] = field(default_factory=list)
    addends: list[Tensor] = field(default_factory=list)
    products: int = 0
    first: int = 0

    @property
    def rows(self) -> Tensor:
        """All inputs, one below the other: [tokens, in]."""
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in self.inputs])

    @property
    def stream(self) -> Tensor | None:
        """The sum of the addends [tokens, out], float32; None without any, or if the weight is used more than once."""
        if not self.addends or self.products != 1:
            return None
        return sum((addend.float() for addend in self.addends[1:]), self.addends[0].float())

    def moved(self, device: torch.device) -> Seen:
        """The same on a device."""
        return replace(self, inputs=[x.to(device) for x in self.inputs], addends=[r.to(device) for r in self.addends])


@dataclass(frozen=True)
class Counts:
    """How many inputs and addends of each weight a run of the block has, so that the next one can stop there."""

    inputs: tuple[int, ...]
    addends: tuple[int, ...]


def see(
    module: nn.Module,
    views: Sequence[View],
    run: Callable[[], object],
    until: Counts | None = None,
    replay: Replay | None = None,
    changing: Sequence[View] = (),
) -> tuple[list[Seen], Counts]:
    """Run a block, and see its weights' inputs and what their outputs are added to; returns both, and their counts.

    until: the counts of an earlier run, at which this one is broken off; replay: what earlier runs with these inputs
    gave; changing: the weights that have other values in the next one.
    """
    seen = [Seen() for _ in views]

    def check() -> None:
        if until is not None and _counts(seen) == until:
            raise _Reached

    following = _Following(check)
    takes = {view: _take(one, following) for view, one in zip(views, seen, strict=True)}
    kept = nullcontext() if replay is None else replay
    closing = {} if replay is None else {view: _closing(replay) for view in changing}
    with suppress(_Reached), kept, following, at_products(module, takes), at_products(module, closing):
        run()
    return seen, _counts(seen)


class _Reached(Exception):
    """All that is wanted was seen."""


def _counts(seen: Sequence[Seen]) -> Counts:
    return Counts(tuple(len(one.inputs) for one in seen), tuple(len(one.addends) for one in seen))


def _closing(replay: Replay) -> Callable[[Tensor], None]:
    def take(x: Tensor) -> None:
        replay.close()

    return take


def _take(seen: Seen, following: _Following) -> Callable[[Tensor], None]:
    def take(x: Tensor) -> None:
        if not seen.inputs:
            seen.first = following.now
        # A copy, as the block may go on with the input in place; one for all weights that share it.
        if x not in following.taken:
            following.taken[x] = x.detach().clone()
        seen.inputs.append(following.taken[x])
        following.expected.append(seen)

    return take


@dataclass(frozen=True)
class _Trace:
    """A tensor that is the output of a weight, times a factor, plus what was added.

    output: the product's output [tokens, out]; born: when it was computed; kept: whether the tensor's rows are where
    they were, None before the first sum.
    """

    seen: Seen
    output: Tensor
    born: int
    factor: Tensor | float = 1.0
    kept: bool | None = None


class _Following(TorchFunctionMode):
    """Follows the outputs of products whose inputs were taken (`expected`)."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self.check, self.expected = check, list[Seen]()
        self.taken: Any = WeakIdKeyDictionary()
        self.traces: Any = WeakIdKeyDictionary()
        self.born: Any = WeakIdKeyDictionary()
        self.now = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.now += 1
        if func in SUMS and self._traced(args[:2]) and len(args) == 2 and kwargs.get("alpha", 1) == 1:
            return self._sum(func, args, kwargs)
        factor = self._factor(func, args)
        result = func(*args, **kwargs)
        if func in PRODUCTS:
            # Inputs are taken before the product, or within it where another context of `at_products` is open.
            expected, self.expected = self.expected, []
            for seen in expected:
                self._start(seen, result)
            if expected:
                self.check()
        elif factor is not None:
            (source, by) = factor
            for trace in self.traces[source]:
                self._add(result, replace(trace, factor=trace.factor * by))
        elif args and _same_values(func, args[0], result):
            for known in (self.traces, self.born):
                if result is not args[0] and args[0] in known:
                    known[result] = known[args[0]]
            return result
        born = self._age(args) if func in SUMS or func in FACTORS else self.now
        for made in flat(result):
            if isinstance(made, Tensor) and made not in self.born:
                self.born[made] = born
        return result

    def _age(self, parts: Sequence[Any]) -> int:
        """When the last part of a sum or product was there: the whole could have been, whenever it is computed."""
        return max((self.born.get(part, 0) for part in parts if isinstance(part, Tensor)), default=0)

    def _start(self, seen: Seen, result: Any) -> None:
        seen.products += 1
        if isinstance(result, Tensor):
            self._add(result, _Trace(seen, result.detach().reshape(-1, result.shape[-1]), self.now))

    def _add(self, tensor: Any, trace: _Trace) -> None:
        self.traces[tensor] = [*self.traces.get(tensor, ()), trace]

    def _traced(self, values: Sequence[Any]) -> bool:
        return any(isinstance(value, Tensor) and value in self.traces for value in values)

    def _factor(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, Any] | None:
        """The traced tensor and its factor, if this is a product with a number or a factor per output."""
        if func not in FACTORS or len(args) != 2 or not self._traced(args):
            return None
        source, by = args if isinstance(args[0], Tensor) and args[0] in self.traces else args[::-1]
        if not isinstance(by, Tensor):
            return source, by
        one = by.numel() == 1 or by.shape == source.shape[-1:]
        return (source, by.detach().float()) if one and by not in self.traces else None

    def _sum(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found: list[_Trace] = []
        for me, other in (args, args[::-1]):
            for trace in self.traces.get(me, ()) if isinstance(me, Tensor) else ():
                kept = _keeps_rows(trace, me) if trace.kept is None else trace.kept
                found.append(replace(trace, kept=kept))
                older = isinstance(other, Tensor) and other.shape == me.shape and self.born.get(other, 0) < trace.born
                if older and kept:
                    # A copy, as a sum in place overwrites its first operand.
                    rows = other.detach().reshape(trace.output.shape).clone()
                    plain = not isinstance(trace.factor, Tensor) and trace.factor == 1
                    trace.seen.addends.append(rows if plain else rows.float() / trace.factor)
        self.check()
        born = self._age(args)
        result = func(*args, **kwargs)
        self.traces[result], self.born[result] = found, born
        return result


def _keeps_rows(trace: _Trace, tensor: Tensor) -> bool:
    """Whether a traced tensor, to which nothing was added, has the product's outputs in the same order."""
    if tensor.shape[-1] != trace.output.shape[-1] or tensor.numel() != trace.output.numel():
        return False
    places = torch.linspace(0, len(trace.output) - 1, COMPARED, device=tensor.device).long()
    made = trace.output[places].float() * trace.factor
    return torch.allclose(tensor.detach().reshape(trace.output.shape)[places].float(), made, rtol=2e-2, atol=0)


def _same_values(func: Callable[..., Any], source: Any, result: Any) -> bool:
    """Whether the result is a tensor with the values of the source, in another shape, dtype or memory."""
    if not (isinstance(source, Tensor) and isinstance(result, Tensor) and result.numel() == source.numel()):
        return False
    return result.is_floating_point() and (
        func in COPIES
        or (
            result.dtype == source.dtype
            and result.data_ptr() == source.data_ptr()
            and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        )
    )
