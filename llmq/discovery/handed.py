"""What blocks hand to later ones beside hidden states.

Values in a block's result that the model's own loop passes into later calls, such as the states of a router or the
tokens that attention chose: they are found by identity, as a block that only records gives out tensors of its own. And
what blocks leave for later ones in a dict or list that all are called with, such as keys and values of attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import SequenceKey, key_get, tree_map_with_path

from llmq.discovery.matmuls import flat
from llmq.discovery.routers import Following
from llmq.errors import LlmqError


@dataclass(frozen=True)
class Handed:
    """In a recorded call, the place of a value that an earlier block hands on: its index, and where in its result."""

    block: int
    path: tuple[Any, ...]


@dataclass(frozen=True)
class Store:
    """In recorded calls, the place of one dict or list that several of them have, where blocks leave things."""

    number: int


class Opened:
    """A store while a block runs: a copy, which the block may change, with its tensors on the block's device."""

    def __init__(self, before: Any, device: torch.device) -> None:
        self.before, self.store = before, copy.copy(before)
        for key, value in entries(before):
            self.store[key] = to_device(value, device)
        self.given = dict(entries(self.store))

    def closed(self, device: torch.device) -> Any:
        """A copy of it as the block left it, with new tensors moved to a device; the others are those of before."""
        made, before = copy.copy(self.store), dict(entries(self.before))
        for key, value in entries(self.store):
            old = key in before and value is self.given[key]
            made[key] = before[key] if old else to_device(value, device)
        return made


def containers(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The dicts and lists among the arguments of a call, which a block may change."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, (MutableMapping, list))]


def entries(store: Any) -> list[tuple[Any, Any]]:
    """The keys or indices of a dict or list, with what is there."""
    return list(store.items() if isinstance(store, Mapping) else enumerate(store))


def to_device(value: Any, device: torch.device) -> Any:
    """The value with its tensors on the device; the same object if all of them are there already."""
    return changed(value, lambda part: part.to(device) if isinstance(part, Tensor) else part)


def find_handed(result: Any, key: Handed) -> Any:
    """The value in a block's result that it hands on. Raises LlmqError if there is none."""
    try:
        return key_get(result, key.path)
    except (LookupError, TypeError) as error:
        raise LlmqError(f"block {key.block} does not return what later blocks take from its result") from error


class Results:
    """What blocks return that only record: the first block's result, or theirs, in which other hidden states are put.

    element: the index of the hidden states, None if they are the result; known: every other tensor that was given out,
    and whose it is, by its identity: each block gives out its own.
    """

    def __init__(
        self, result: Any, arguments: list[Any], following: Following | None, others: Mapping[int, Any]
    ) -> None:
        self.result, self.others, self.element, self.following = result, others, _element_of(result), following
        self.hidden: Tensor = result if self.element is None else result[self.element]
        self.known: dict[int, tuple[Tensor, Handed]] = {}
        # Blocks may leave things for later ones in a container, but only in one that they are called with.
        parts = [] if self.element is None else [part for part in result if isinstance(part, (dict, list))]
        strange = [part for part in parts if not any(part is argument for argument in arguments)]
        self.stuck = {id(value) for value in flat(strange) if isinstance(value, Tensor)}

    def of(self, block: int, hidden: Tensor | None) -> Any:
        """The result of a block, with these hidden states."""
        if self.element is None:
            return hidden
        result = self.others.get(block, self.result)
        place: SequenceKey[Any] = SequenceKey(self.element)

        def give(path: tuple[Any, ...], value: Any) -> Any:
            if path == (place,):
                return hidden
            if not isinstance(value, Tensor):
                return value
            other = value.detach()
            self.known[id(other)] = other, Handed(block, path)
            if self.following is not None:
                self.following.mark(other)
            return other

        return tree_map_with_path(give, result, is_leaf=lambda v: isinstance(v, (dict, list)) and v is not result)

    def marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with the places of values that other blocks gave out. Raises LlmqError."""

        def mark(value: Any) -> Any:
            return self.known[id(value)][1] if id(value) in self.known else value

        found = changed(args, mark, (tuple,)), {k: changed(v, mark, (tuple,)) for k, v in kwargs.items()}
        reached = self.following.reached if self.following is not None else lambda value: False
        if any(id(v) in self.known or id(v) in self.stuck or reached(v) for v in flat(found) if isinstance(v, Tensor)):
            raise LlmqError(
                "the model changes a second value between its blocks, or hands it on in a list or dict, which llmq "
                "cannot stream yet"
            )
        return found

    def sample(self, key: Handed) -> Tensor:
        """A value of those that blocks hand on."""
        value: Tensor = key_get(self.others.get(key.block, self.result), key.path)
        return value


def _element_of(result: Any) -> int | None:
    """The index of the hidden states in a block's result; None if they are the result. Raises LlmqError."""
    if isinstance(result, Tensor):
        return None
    if type(result) in (tuple, list):
        for i, value in enumerate(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                return i
    raise LlmqError(f"a block returns a {type(result).__name__}, in which llmq cannot find the hidden states")


def changed(value: Any, change: Callable[[Any], Any], into: tuple[type, ...] = (Mapping, tuple, list)) -> Any:
    """The value with `change` applied to all that is in it; the same object if that changes nothing.

    into: the containers whose contents are changed.
    """
    if isinstance(value, Mapping) and isinstance(value, into):
        parts = {key: changed(part, change, into) for key, part in value.items()}
        return value if all(parts[key] is part for key, part in value.items()) else parts
    if isinstance(value, (tuple, list)) and isinstance(value, into):
        items = [changed(part, change, into) for part in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)
