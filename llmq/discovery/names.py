"""Maps the model's parameters to the checkpoint's tensors, by transformers' own renaming and conversion rules.

The output keeps the source's tensor names, so every server that can read the source can read the output; but for
parameters that transformers joins of several tensors, which it cannot do with plain tensors in a quantized folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from llmq.discovery.conversion import Conversion, Part, Slice, conversion
from llmq.discovery.rename import Rules


@dataclass
class Links:
    """Where the model's parameters and buffers are stored.

    source: name → the one tensor that is it; slices: name → the tensors that fill it part by part; cuts: name → the
    larger tensor of which it is a part; conversions: name → what transformers computes it with; failed: name → why
    transformers could not make it; unused: tensors that the model does not have.
    """

    source: dict[str, str] = field(default_factory=dict)
    slices: dict[str, tuple[Slice, ...]] = field(default_factory=dict)
    cuts: dict[str, Slice] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The parameters and buffers that something is stored for."""
        return [*self.source, *self.slices, *self.cuts, *self.conversions]

    def tensors(self, name: str) -> tuple[str, ...]:
        """The stored tensors of which a parameter or buffer is made; empty if there are none."""
        if name in self.source:
            return (self.source[name],)
        if name in self.slices:
            return tuple(part.tensor for part in self.slices[name])
        if name in self.cuts:
            return (self.cuts[name].tensor,)
        return tuple(self.conversions[name].names) if name in self.conversions else ()

    def why_apart(self, name: str) -> str | None:
        """Why no stored tensor alone is the parameter; None if one is, or none is known."""
        if name in self.failed:
            return self.failed[name]
        found = self.tensors(name)
        return None if name in self.source or not found else f"transformers converts {found[0]} while loading it"

    def fill(self, name: str, shape: Sequence[int], read: Callable[[str], Tensor]) -> Tensor:
        """The value of a parameter or buffer, of a dtype that holds all stored ones. read: returns a stored tensor.

        Raises KeyError if nothing is stored for it.
        """
        if name in self.source:
            return read(self.source[name])
        if name in self.slices:
            value: Tensor | None = None
            for piece in self.slices[name]:
                stored = read(piece.tensor)
                value = torch.empty(tuple(shape), dtype=stored.dtype) if value is None else value
                value = value.to(torch.promote_types(value.dtype, stored.dtype))
                piece.part.of(value).copy_(stored)
            assert value is not None
            return value
        if name in self.cuts:
            return self.cuts[name].part.of(read(self.cuts[name].tensor).contiguous()).contiguous()
        return self.conversions[name].convert(read)[name]

    def fill_entry(
        self,
        name: str,
        shape: Sequence[int],
        index: int,
        read: Callable[[str], Tensor],
        entry: Callable[[str, int], Tensor] | None = None,
    ) -> Tensor:
        """One entry along the first axis of a parameter of this shape. Of slices, only its own are read.

        entry: reads an entry of a stored tensor alone. Raises KeyError if nothing is stored for the parameter.
        """
        if name in self.source and entry is not None:
            return entry(self.source[name], index)
        if name not in self.slices:
            return self.fill(name, shape, read)[index].clone()
        size = prod(shape[1:])
        pieces = [(piece.tensor, piece.part) for piece in self.slices[name]]
        if all(part.stride[:1] == (size,) and part.shape[0] == shape[0] for _, part in pieces):
            # Each stored tensor has all entries, in another layout.
            mine = [Slice(tensor, Part(part.offset, part.shape[1:], part.stride[1:])) for tensor, part in pieces]
            alone = Links(slices={name: tuple(mine)})
            return alone.fill(name, shape[1:], lambda n: entry(n, index) if entry is not None else read(n)[index])
        inside = [(tensor, part) for tensor, part in pieces if part.offset // size == index]
        mine = [Slice(tensor, Part(part.offset - index * size, part.shape, part.stride)) for tensor, part in inside]
        return Links(slices={name: tuple(mine)}).fill(name, shape[1:], read)


def link(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Links:
    """Match the checkpoint's tensors to the model's parameters and buffers, as from_pretrained would.

    shapes: of the checkpoint's tensors, by name.
    """
    rules, state, links = Rules(model), model.state_dict(), Links()
    joined: dict[str, dict[str, list[str]]] = {}
    for name in rules.ordered(shapes):
        target, pattern = rules.rename(name)
        if target not in state:
            links.unused.append(name)
        elif pattern is None:
            links.source[target] = name
        else:
            joined.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, tensors in joined.items():
        _join(links, conversion(target, rules.converter(next(iter(tensors))), model, tensors, shapes), target, shapes)
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        stored = next((links.source[name] for name in names if name in links.source), None)
        if stored is not None:
            links.source |= {name: stored for name in names if name not in links.source}
    return links


def _join(links: Links, found: Conversion | str, target: str, shapes: Mapping[str, Sequence[int]]) -> None:
    if isinstance(found, str):
        links.failed[target] = found
    elif filled := found.filled(shapes):
        links.slices |= filled
    elif cut := found.cut(shapes):
        links.cuts |= cut
    else:
        links.conversions |= dict.fromkeys(found.parameters, found)
