"""How the keys and values that a server keeps of its tokens are rounded: on a grid, with a scale for each layer."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import LlmqError

GRIDS = {"fp8": "fp8", "int8": "int"}
"""A name that people write → the grid, whose inputs are rounded alike (`Grid.inputs`)."""
HEADS = "-head"
CACHES = tuple(f"{name}{ending}" for name in GRIDS for ending in ("", HEADS))
"""All that can be asked for."""


@dataclass(frozen=True)
class Cache:
    """grid: of the values, 8 bits each; heads: a scale for each head, or one for all of a layer's."""

    grid: str
    heads: bool = False

    def __str__(self) -> str:
        return next(name for name, grid in GRIDS.items() if grid == self.grid) + (HEADS if self.heads else "")

    @property
    def integers(self) -> bool:
        """Whether the values are whole numbers, times the scale."""
        return self.grid == "int"

    @property
    def told(self) -> str:
        """In words."""
        return f"{str(self).removesuffix(HEADS)}, a scale {'for each head' if self.heads else 'per layer'}"

    @staticmethod
    def named(name: str) -> Cache:
        """The one that has this name. Raises LlmqError for any other."""
        if name not in CACHES:
            raise LlmqError(f"a cache is rounded to {', '.join(CACHES)}, not to {name!r}")
        return Cache(GRIDS[name.removesuffix(HEADS)], name.endswith(HEADS))
