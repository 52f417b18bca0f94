"""Observe and replace the inputs of weights at the matrix products that use them.

A weight is a `View`: a parameter or a part of one. The weights that a product uses are identified by its operand's
position in the parameter's memory, when the product is computed, so parameters may be replaced at any time. So a
product with an expert's slice is observed like that of a linear layer, and so is a single product with a fused
parameter or with all experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmq.discovery.matmuls import Products
from llmq.discovery.view import View
from llmq.errors import LlmqError

Take = Callable[[Tensor], Tensor | None]
"""Called with a weight's input [..., in]; returns the input that the product uses instead, or None for no change."""

LEFT = {torch.addmm: 1, torch.Tensor.addmm: 1, torch.baddbmm: 1}
"""The position of a product's left operand among its arguments, if it is not the first; the right one follows it."""
LEFT_NAMES, RIGHT_NAMES = ("mat1", "batch1", "input"), ("weight", "mat2", "batch2", "other", "tensor2")


class Takes(Protocol):
    """The interface for consumers of an input, such as statistics."""

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""


class _Use(NamedTuple):
    """A weight that a product uses; batch: its index on the operand's batch axes, None if it gets the whole input."""

    view: View
    take: Take
    batch: tuple[int, ...] | None


@contextmanager
def collect(module: nn.Module, statistics: Mapping[View, Sequence[Takes]]) -> Iterator[None]:
    """Within the context, pass each weight's input to its statistics."""

    def feed(those: Sequence[Takes]) -> Take:
        def take(x: Tensor) -> None:
            for statistic in those:
                statistic.update(x)

        return take

    with at_products(module, {view: feed(those) for view, those in statistics.items() if those}):
        yield


@contextmanager
def at_products(module: nn.Module, takes: Mapping[View, Take]) -> Iterator[None]:
    """Within the context, pass the input of each weight of a module to its function, at every product with the weight.

    If contexts of the same module are nested, the inner one gets the input that the outer one returned. Products raise
    LlmqError if weights that share an input replace it by different values, and for einsum with one of the weights,
    whose input cannot be identified.
    """
    if not takes:
        yield
        return
    layer, inputs = _Layer(module, takes), _OPEN.get()
    if inputs is not None and inputs.module is module:
        inputs.layers.append(layer)
        try:
            yield
        finally:
            inputs.layers.remove(layer)
        return
    opened = _Inputs(module, [layer])
    token = _OPEN.set(opened)
    try:
        with opened:
            yield
    finally:
        _OPEN.reset(token)


class _Inputs(Products):
    """All open contexts of a module, the outermost first."""

    def __init__(self, module: nn.Module, layers: list[_Layer]) -> None:
        super().__init__()
        self.module, self.layers = module, layers

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Products.product`."""
        for layer in self.layers:
            args, kwargs = layer.change(func, args, kwargs)
        return args, kwargs


_OPEN: ContextVar[_Inputs | None] = ContextVar("inputs watched", default=None)


class _Layer:
    """One context: the functions of inputs, and a cache of the functions that each kind of operand calls."""

    def __init__(self, module: nn.Module, takes: Mapping[View, Take]) -> None:
        self.takes: dict[str, list[tuple[View, Take]]] = {}
        for view, take in takes.items():
            self.takes.setdefault(view.parameter, []).append((view, take))
        self.places: dict[str, tuple[nn.Module, str]] = {}
        for name in self.takes:
            owner, _, leaf = name.rpartition(".")
            self.places[name] = module.get_submodule(owner), leaf
        self.known: dict[Any, list[_Use]] = {}

    def change(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a product, with its input replaced if a function returned another."""
        if func is torch.einsum:
            self._refuse_einsum(args)
            return args, kwargs
        first = LEFT.get(func, 0)
        left, right = _place(args, kwargs, first, LEFT_NAMES), _place(args, kwargs, first + 1, RIGHT_NAMES)
        linear = func is torch.nn.functional.linear
        for matrix, other, transposed in ((right, left, not linear), (left, right, False)):
            operand, x = _at(args, kwargs, matrix), _at(args, kwargs, other)
            if not isinstance(x, Tensor) or not isinstance(operand, Tensor) or operand.dim() < 2:
                continue
            uses = self._uses(operand, transposed)
            if uses:
                # A weight to the left of its input multiplies the input's columns.
                columns = matrix is left and x.dim() > 1
                new = _taken(x.mT if columns else x, uses)
                if new is not None:
                    args, kwargs = _with(args, kwargs, other, new.mT if columns else new)
                break
        return args, kwargs

    def _uses(self, operand: Tensor, transposed: bool) -> list[_Use]:
        """The weights in an operand, [..., out, in] or, if `transposed`, [..., in, out]."""
        pointer = operand.untyped_storage().data_ptr()
        for name, (holder, leaf) in self.places.items():
            parameter = holder._parameters[leaf]
            if parameter is None or parameter.untyped_storage().data_ptr() != pointer or not pointer:
                continue
            start = operand.storage_offset() - parameter.storage_offset()
            key = name, transposed, start, operand.shape, operand.stride(), parameter.shape, parameter.stride()
            if key not in self.known:
                matrix = operand.detach().mT if transposed else operand.detach()
                stored = parameter.detach()
                self.known[key] = [use for view, take in self.takes[name] for use in _found(matrix, stored, view, take)]
            if self.known[key]:
                return self.known[key]
        return []

    def _refuse_einsum(self, args: tuple[Any, ...]) -> None:
        operands = [t for a in args for t in (a if isinstance(a, (tuple, list)) else [a]) if isinstance(t, Tensor)]
        held = {t.untyped_storage().data_ptr() for t in operands}
        for name, (holder, leaf) in self.places.items():
            parameter = holder._parameters[leaf]
            if parameter is not None and parameter.untyped_storage().data_ptr() in held:
                raise LlmqError(
                    f"{name}: the model uses it in an einsum, where llmq cannot identify its input; exclude it by "
                    "--keep"
                )


def _place(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, names: tuple[str, ...]) -> int | str | None:
    """How an operand was passed: its position, or its argument name."""
    return position if position < len(args) else next((name for name in names if name in kwargs), None)


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str | None) -> Any:
    if place is None:
        return None
    return args[place] if isinstance(place, int) else kwargs[place]


def _with(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str | None, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with one operand replaced."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    assert place is not None
    return args, kwargs | {place: value}


def _found(matrix: Tensor, stored: Tensor, view: View, take: Take) -> Iterator[_Use]:
    """How an operand [..., out, in] in a parameter's memory uses a weight, for each entry of its batch axes."""
    weight = view.of(stored)
    rows, width = matrix.shape[-2:]
    step, along = matrix.stride()[-2:]
    if width != weight.shape[1] or (width > 1 and along != weight.stride(1)):
        return
    if rows > 1 and weight.shape[0] > 1 and step != weight.stride(0):
        return
    step = (step if rows > 1 else weight.stride(0)) or 1
    batch = matrix.shape[:-2]
    hit = []
    for entry in itertools.product(*map(range, batch)):
        start = matrix.storage_offset() + sum(i * s for i, s in zip(entry, matrix.stride(), strict=False))
        first, odd = divmod(int(weight.storage_offset()) - int(start), int(step))
        if not odd and -weight.shape[0] < first < rows:
            hit.append(entry)
    if len(hit) == batch.numel():
        yield _Use(view, take, None)
    else:
        yield from (_Use(view, take, entry) for entry in hit)


def _taken(x: Tensor, uses: list[_Use]) -> Tensor | None:
    """Pass a product's input [..., rows, in] to the functions of its weights; returns the replaced input, or None.

    Raises LlmqError if two weights replace the same part of it by different values.
    """
    made: dict[tuple[int | None, ...], tuple[Tensor, View]] = {}
    for view, take, batch in uses:
        axes = _axes(x, batch)
        new = take(x[_index(axes)] if axes else x)
        if new is None:
            continue
        other = made.get(axes)
        if other is not None and other[0] is not new and not torch.equal(other[0], new):
            raise LlmqError(f"{other[1].name} and {view.name} share an input and round it differently")
        made[axes] = new, view
    if not made or () in made:
        return made[()][0] if made else None
    whole = x.clone()
    for axes, (new, _) in made.items():
        whole[_index(axes)] = new
    return whole


def _axes(x: Tensor, batch: tuple[int, ...] | None) -> tuple[int | None, ...]:
    """The part of an input [..., rows, in] that an entry of the operand's batch axes multiplies: an index on each axis
    before the last two, None for the whole axis; empty for the whole input.
    """
    axes: list[int | None] = [None] * max(0, x.dim() - 2)
    for i, place in zip(reversed(range(len(axes))), reversed(batch or ()), strict=False):
        axes[i] = place if x.shape[i] > 1 else None
    return () if all(axis is None for axis in axes) else tuple(axes)


def _index(axes: tuple[int | None, ...]) -> tuple[int | slice, ...]:
    return tuple(slice(None) if axis is None else axis for axis in axes)
