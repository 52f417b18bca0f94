"""Observes every matrix product with a parameter of a block.

Products are observed at the torch function, not at nn.Linear, so those with fused and sliced parameters are included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
    torch.mm,
    torch.Tensor.mm,
    torch.addmm,
    torch.Tensor.addmm,
    torch.baddbmm,
    torch.einsum,
}

WITH_ADDEND = {torch.addmm, torch.Tensor.addmm, torch.baddbmm}

CHOICES = {
    torch.topk,
    torch.Tensor.topk,
    torch.argmax,
    torch.Tensor.argmax,
    torch.sort,
    torch.Tensor.sort,
    torch.argsort,
    torch.Tensor.argsort,
    torch.nonzero,
    torch.Tensor.nonzero,
    torch.nn.functional.one_hot,
}


@dataclass
class Matmul:
    """One observed product: the parameter's name, the other operand, its rows, and whether the whole parameter was
    used.

    part: the offset of the used part in the parameter's memory, and its number of elements; chosen: whether a selection
    by value (as a router selects experts) came before this product; axis: the axis of the parameter that the product
    sums over (1 for nn.Linear), None if it cannot be determined, or if the part has less than this whole axis; along:
    the same, also for such a part; dense: whether the part has no gaps in the parameter's memory.
    """

    parameter: str
    input: Tensor | None
    tokens: int
    whole: bool
    part: tuple[int, int]
    chosen: bool
    axis: int | None = None
    along: int | None = None
    dense: bool = False


class Products(TorchFunctionMode):
    """Intercepts every matrix product before it is computed, and may change its operands."""

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the product is computed."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            args, kwargs = self.product(func, args, kwargs)
        return func(*args, **kwargs)


class _Watch(Products):
    def __init__(self, module: nn.Module, seen: list[Matmul]) -> None:
        super().__init__()
        self.owners = {p.untyped_storage().data_ptr(): (n, p) for n, p in module.named_parameters() if p.numel()}
        self.seen = seen
        self.chosen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.chosen = self.chosen or func in CHOICES
        return super().__torch_function__(func, types, args, kwargs)

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Products.product`: records products with a parameter, and changes nothing."""
        # The addend of a sum with a product is no operand of the product.
        added = kwargs.get("input", args[0] if args else None) if func in WITH_ADDEND else None
        matrices = [t for t in flat((args, kwargs)) if isinstance(t, Tensor) and t.dim() >= 2 and t is not added]
        for operand in matrices:
            owner = self.owners.get(operand.untyped_storage().data_ptr())
            others = [t for t in matrices if t is not operand]
            if owner is None or not others:
                continue
            name, parameter = owner
            part = (int(operand.storage_offset()), operand.numel())
            x, whole = others[0], parameter.dim() == 2 and operand.numel() == parameter.numel()
            along, full = _summed(func, operand, operand is matrices[-1], parameter)
            tokens, axis = x.numel() // max(1, x.shape[-1]), along if full else None
            self.seen.append(Matmul(name, x, tokens, whole, part, self.chosen, axis, along, _is_dense(operand)))
        return args, kwargs


def _summed(func: Callable[..., Any], operand: Tensor, last: bool, parameter: Tensor) -> tuple[int | None, bool]:
    """The axis of the parameter that a product sums over, if it can be determined, and whether all of it."""
    if func is torch.einsum:
        return None, False
    axis = -2 if last and func is not torch.nn.functional.linear else -1
    # The operand may be a transposed view: the axis is identified by its stride.
    own = [a for a in range(parameter.dim()) if parameter.stride(a) == operand.stride(axis)]
    return (own[0], parameter.shape[own[0]] == operand.shape[axis]) if len(own) == 1 else (None, False)


def _is_dense(part: Tensor) -> bool:
    """Whether a view's elements are next to each other in memory, in any order."""
    size = 1
    for step, entries in sorted(zip(part.stride(), part.shape, strict=True)):
        if entries > 1 and step != size:
            return False
        size *= entries
    return True


def flat(value: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists and dicts, in order."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


@contextmanager
def watch_matmuls(module: nn.Module) -> Iterator[list[Matmul]]:
    """Products with the module's parameters, in order, within the context (inputs are kept in memory)."""
    seen: list[Matmul] = []
    with _Watch(module, seen):
        yield seen


@dataclass
class Modules:
    """How often each Linear was called, and the outputs of the modules whose parameters are all vectors."""

    linears: dict[str, int]
    norms: list[Tensor]


@contextmanager
def watch_modules(module: nn.Module) -> Iterator[Modules]:
    """Records which submodules are called within the context (outputs are kept in memory)."""
    seen = Modules({}, [])

    def norm(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.norms.append(output)

    hooks = []
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if isinstance(part, nn.Linear):

            def linear(_: nn.Module, __: Any, ___: Any, name: str = name) -> None:
                seen.linears[name] = seen.linears.get(name, 0) + 1

            hooks.append(part.register_forward_hook(linear))
        elif own and not any(part.children()) and all(p.dim() == 1 for p in own):
            hooks.append(part.register_forward_hook(norm))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
