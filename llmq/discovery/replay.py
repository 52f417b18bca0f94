"""Runs of a block that begin as an earlier run did: what products and attention gave there is not computed again.

The weights of a block are quantized in the order of their use, so a run for later ones repeats the beginning of the
run for earlier ones, number by number. Everything but these few functions is computed again, so nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmq.discovery.matmuls import PRODUCTS

KEPT = PRODUCTS | {torch.nn.functional.scaled_dot_product_attention}


class Replay(TorchFunctionMode):
    """What the kept functions of a run gave, in their order, up to the first that a later run may compute otherwise.

    A context for each run with the same inputs and, up to `close`, the same weights. room: the most bytes to keep.
    A result that was changed in place, and what came after it, is computed again.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.kept = room, list[tuple[Any, Tensor, int]]()
        self.place, self.open = 0, False

    def __enter__(self) -> Self:
        self.place, self.open = 0, True
        entered: Self = super().__enter__()  # type: ignore[no-untyped-call]
        return entered

    def close(self) -> None:
        """Nothing from here on is kept in this run: it depends on what later runs have other values of."""
        self.open = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in KEPT or torch.is_inference_mode_enabled():
            return func(*args, **kwargs)
        place, self.place = self.place, self.place + 1
        if place < len(self.kept):
            made, result, version = self.kept[place]
            if made == _call(func, args) and result._version == version:
                return result
            del self.kept[place:]
        result = func(*args, **kwargs)
        used = sum(one.untyped_storage().nbytes() for _, one, _ in self.kept)
        if (
            self.open
            and isinstance(result, Tensor)
            and "out" not in kwargs
            and used + result.untyped_storage().nbytes() <= self.room
        ):
            self.kept.append((_call(func, args), result, result._version))
        else:
            self.close()
        return result


def _call(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What tells a call from others at its place: a run that takes another way computes its own."""
    return func, tuple((one.shape, one.dtype) for one in args if isinstance(one, Tensor))
