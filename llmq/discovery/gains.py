"""Gains: parameters with one axis that values are multiplied by, such as those of norms, found by running a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOLLOWED = {
    "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "slice", "alias", "detach", "clone",
    "contiguous", "_to_copy", "to", "add", "rsub", "sub", "mul",
}  # fmt: skip
"""Operators whose result is still the parameter: views, conversions, and sums or products with a constant."""
PRODUCTS = {"mul", "mul_"}
WEIGHTS = "weight"
"""The name of a norm operator's argument that its normalized input is multiplied by, in torch's own schemas."""


@contextmanager
def watch_gains(module: nn.Module) -> Iterator[set[str]]:
    """Within the context, the set becomes the names of those parameters with one axis and two or more elements that
    something else is multiplied by, and that are used in no other way.

    Each parameter must have memory of its own.
    """
    names = {
        p.untyped_storage().data_ptr(): name
        for name, p in module.named_parameters()
        if p.dim() == 1 and p.numel() > 1 and p.device.type != "meta"
    }
    found: set[str] = set()
    with _Watch(names, found) as watch:
        yield found
    found -= watch.other


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters through an operator after the other."""

    def __init__(self, names: dict[int, str], found: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.found = names, found
        self.other: set[str] = set()
        # A followed tensor is kept, so that no other one gets its identity.
        self.followed: dict[int, tuple[Tensor, str]] = {}

    def _name(self, value: Tensor) -> str | None:
        if id(value) in self.followed:
            return self.followed[id(value)][1]
        return None if value.device.type == "meta" else self.names.get(value.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        named = {name: value for value in tensors if (name := self._name(value)) is not None}
        if named:
            operator = func._schema.name.partition("::")[2]
            varying = [value for value in tensors if self._name(value) is None and value.numel() > 1]
            for name, value in named.items():
                if not varying and operator in FOLLOWED and isinstance(result, Tensor):
                    self.followed[id(result)] = result, name
                elif (operator in PRODUCTS and varying) or self._is_weight(func, args, kwargs, value):
                    self.found.add(name)
                else:
                    self.other.add(name)
        return result

    @staticmethod
    def _is_weight(func: Any, args: Any, kwargs: Any, value: Tensor) -> bool:
        """Whether a parameter is the weight of an operator that normalizes."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        return given.get(WEIGHTS) is value and "norm" in func._schema.name


def gains(module: nn.Module, run: Any) -> set[str]:
    """The gains of a module whose parameters have memory; run: calls it."""
    with torch.no_grad(), watch_gains(module) as found:
        run()
    return found
