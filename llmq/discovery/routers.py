"""Finds the weights before and behind a block's routed experts, by following tensors through a run of the block.

Before: those whose products decide which experts a token goes to; rounding them would change the choice itself. The
output of every product with a parameter is followed through all that is no product, up to the experts' choices; and
through products, too, for the inner layers of a router, whose values reach the block's output by the choices only.
Behind: those that the experts' output feeds; it is followed through everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmq.discovery.matmuls import CHOICES, PRODUCTS, flat


@contextmanager
def follow_products(block: nn.Module) -> Iterator[Following]:
    """Within the context, follows the products of a block's parameters."""
    with Following(block) as following:
        yield following


class Following(TorchFunctionMode):
    """What was computed of what. behind: the parameters in products with what was computed of a `marked` tensor;
    choosing: those whose products a selection by value is made of without another product between.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.behind: set[str] = set()
        self.choosing: set[str] = set()
        self._marked: dict[int, Tensor] = {}
        self.owners = {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters() if p.numel()}
        # The tensors are kept, because an id is used again once its object is gone.
        self.known: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._made: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def before(self, tensor: Tensor) -> frozenset[str]:
        """The parameters whose products a tensor is made of without another product."""
        return self.known[id(tensor)][1] if id(tensor) in self.known else frozenset()

    def made_of(self, tensor: Tensor) -> frozenset[str]:
        """The parameters whose products a tensor is made of, through any number of other products."""
        return self._made[id(tensor)][1] if id(tensor) in self._made else frozenset()

    def leave_out(self, output: Tensor, rows: Tensor) -> None:
        """Take the experts' output as made of the rows that enter them, but not of choices and weights."""
        self._made[id(output)] = output, self.made_of(rows)

    def mark(self, tensor: Tensor) -> None:
        """Follow a tensor, and all that is computed of it."""
        self._marked[id(tensor)] = tensor

    def reached(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed of a marked one, or is one."""
        return id(tensor) in self._marked

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in flat((args, kwargs or {})) if isinstance(t, Tensor)]
        marked = any(id(t) in self._marked for t in tensors)
        made_of = frozenset[str]().union(*map(self.made_of, tensors))
        if func in PRODUCTS:
            pointers = (t.untyped_storage().data_ptr() for t in tensors)
            names = frozenset(self.owners[p] for p in pointers if p in self.owners)
            self.behind |= names if marked else set()
            made_of |= names
        else:
            names = frozenset[str]().union(*(self.known[id(t)][1] for t in tensors if id(t) in self.known))
            self.choosing |= names if func in CHOICES else set()
        result = func(*args, **(kwargs or {}))
        # What returns nothing writes to its first argument.
        for made in flat(result if result is not None else args[:1]):
            if isinstance(made, Tensor):
                if made_of or id(made) in self._made:
                    self._made[id(made)] = made, made_of
                if names or id(made) in self.known:
                    self.known[id(made)] = made, names
                if marked:
                    self.mark(made)
        return result
