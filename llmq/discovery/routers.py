"""Finds the weights whose products decide which experts a token goes to: rounding them would change the choice itself.

The output of every product with a parameter is followed through all that is no product, up to the experts' choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmq.discovery.matmuls import PRODUCTS, flat


@contextmanager
def follow_products(block: nn.Module) -> Iterator[Callable[[Tensor], frozenset[str]]]:
    """Within the context, follows the products of a block's parameters.

    Yields a function: a tensor computed there → the parameters whose products it is made of without another product.
    """
    with _Follow(block) as follow:
        yield lambda tensor: follow.known[id(tensor)][1] if id(tensor) in follow.known else frozenset()


class _Follow(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.owners = {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters() if p.numel()}
        # The tensors are kept, because an id is used again once its object is gone.
        self.known: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in flat((args, kwargs or {})) if isinstance(t, Tensor)]
        if func in PRODUCTS:
            pointers = (t.untyped_storage().data_ptr() for t in tensors)
            names = frozenset(self.owners[p] for p in pointers if p in self.owners)
        else:
            names = frozenset[str]().union(*(self.known[id(t)][1] for t in tensors if id(t) in self.known))
        result = func(*args, **(kwargs or {}))
        for made in flat(result):
            if isinstance(made, Tensor) and (names or id(made) in self.known):
                self.known[id(made)] = made, names
        return result
