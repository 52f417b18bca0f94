"""A dry run: a model's code with all its shapes and indices, without the arithmetic and memory of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

LARGEST_LOOKUP = 1 << 26

_ATEN = torch.ops.aten
_OF_VALUES = (_ATEN.nonzero.default,)
_LOOKUPS = (_ATEN.embedding.default, _ATEN.gather.default, _ATEN.index.Tensor, _ATEN.index_select.default)


@contextmanager
def without_arithmetic() -> Iterator[None]:
    """Inside, operators on floating-point tensors return zeros of the right shape and dtype, in constant time.

    They raise an error for wrong shapes, as when executed. Operators on integers and booleans, on single numbers, and
    lookups by index are executed, so that an index out of range raises too; not a lookup of more than 64 MiB.
    """
    with torch.no_grad(), _Shapes():  # type: ignore[no-untyped-call]
        yield


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        values, spec = tree_flatten((args, named))
        converts = getattr(named.get("dtype"), "is_floating_point", False)
        # What returns no tensor asks for a value: of zeros it is known.
        asks = func in _OF_VALUES or not all("Tensor" in str(result.type) for result in func._schema.returns)
        if asks or not (converts or any(_is_large(value) for value in values)):
            return func(*args, **named)
        shapes = [_on_meta(value) for value in values]
        args_on_meta, named_on_meta = tree_unflatten(shapes, spec)
        if "device" in named:
            named_on_meta["device"] = torch.device("meta")
        result = func(*args_on_meta, **named_on_meta)
        single = converts and isinstance(result, Tensor) and result.numel() <= 1
        if single or (func in _LOOKUPS and result.nbytes <= LARGEST_LOOKUP):
            return func(*args, **named)
        # An operator that writes to its argument returns it.
        same = {id(shape): value for shape, value in zip(shapes, values, strict=True) if isinstance(value, Tensor)}
        return tree_map(lambda value: same.get(id(value), _zeros_like(value)), result)


def _is_large(value: Any) -> bool:
    """Whether a value is a tensor of numbers that are not computed."""
    return isinstance(value, Tensor) and value.numel() > 1 and (value.is_floating_point() or value.is_complex())


def _on_meta(value: Any) -> Any:
    """A tensor's shape, strides and dtype on the meta device."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _zeros_like(value: Any) -> Any:
    """Zeros of a tensor's shape, in the memory of one."""
    return torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, Tensor) else value
