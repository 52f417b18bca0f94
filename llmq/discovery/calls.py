"""The recording pass: run a model whose blocks only record their arguments, so that each can be run alone later.

Every block's call is kept, because in many models masks and position tables differ between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.matmuls import flat
from llmq.errors import LlmqError, first_line


@dataclass
class Call:
    """A recorded call: its arguments without the hidden states; `slot` takes them, `element` is their index in the
    result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str
    element: int | None

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for input `hidden` [batch, tokens, width]."""
        device = hidden.device
        args, kwargs = [_to(a, device) for a in self.args], {k: _to(v, device) for k, v in self.kwargs.items()}
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        result = block(*args, **kwargs)
        output: Tensor = result if self.element is None else result[self.element]
        return output


@dataclass
class Recording:
    """The result of the recording pass: for each batch, the first block's input and every block's call.

    handed: what blocks' calls have of the first block's result beside the hidden states, by the block's index.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    handed: dict[int, list[Tensor]] = field(default_factory=dict)

    def of_block(self, index: int) -> list[Call]:
        """One block's calls, batch by batch."""
        return [calls[index] for calls in self.calls]


def _to(value: Any, device: torch.device) -> Any:
    """The value with its tensors on the device; the same object if all of them are there already."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: _to(part, device) for key, part in value.items()}
        return value if all(moved[key] is part for key, part in value.items()) else moved
    if isinstance(value, (tuple, list)):
        parts = [_to(part, device) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class _EndOfPass(Exception):
    """Ends a forward pass once the last block has been called."""


@contextmanager
def of_length(what: str, tokens: int, option: str = "--seqlen") -> Iterator[None]:
    """Turns any failure of a model's code inside into an LlmqError that names the number of tokens.

    what: it failed; option: which sets the number of tokens.
    """
    try:
        yield
    except LlmqError:
        raise
    except Exception as error:  # model code may fail in any way
        raise LlmqError(
            f"{what} fails on windows of {tokens} tokens ({type(error).__name__}: {first_line(error)}): "
            f"give a smaller {option}"
        ) from error


def reach(model: nn.Module, block: nn.Module, batch: Tensor) -> None:
    """Run the model on token ids [batch, tokens] up to its first block; what lies before it must be in memory."""

    def make(i: int, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _EndOfPass

        return forward

    with torch.no_grad(), _forwards([block], make), suppress(_EndOfPass):
        model(batch, use_cache=False)


Forward = Callable[..., Any]


@contextmanager
def _forwards(modules: list[nn.Module], make: Callable[[int, Forward], Forward]) -> Iterator[None]:
    for i, module in enumerate(modules):
        module.forward = make(i, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def record(
    model: nn.Module,
    blocks: list[nn.Module],
    batches: Iterable[Tensor],
    *,
    whole: bool = False,
    first: Callable[..., Any] | None = None,
) -> Recording:
    """Run the model once per batch of token ids [batch, tokens] with blocks that only record their arguments.

    Only the first block really runs, once, to see what a block returns: its parameters and everything before the blocks
    must be in memory. `whole`: continue past the last block to the output embedding, to detect blocks that are called
    again; `first`: what runs instead of the first block. Raises LlmqError if the blocks are not called once each,
    in order, each on the output of the one before.
    """
    recording = Recording()
    element: int | None = None
    rest: tuple[Any, ...] = ()
    kind: type | None = None
    seen: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
    hidden: Tensor | None = None

    def make(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal element, rest, kind, hidden
            if len(seen) >= len(blocks):
                raise LlmqError("the blocks are called more than once per pass, which llmq cannot stream yet")
            seen.append((i, args, kwargs))
            if i == 0 and kind is None:
                result = (first or original)(*args, **kwargs)
                kind, element, rest = _shape_of_result(result)
                template = result if element is None else result[element]
                hidden = _hidden_of(args, kwargs, template.shape)
            elif i == 0:
                assert recording.calls
                slot = recording.calls[0][0].slot
                hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
            if i == len(blocks) - 1 and not whole:
                raise _EndOfPass
            if element is None:
                return hidden
            assert kind is not None
            return kind((*rest[:element], hidden, *rest[element + 1 :]))

        return forward

    head = getattr(model, "get_output_embeddings", lambda: None)()
    stoppers = [head] if isinstance(head, nn.Module) else []

    def stop(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _EndOfPass

        return forward

    with torch.no_grad(), _forwards(blocks, make), _forwards(stoppers, stop):
        for batch in batches:
            seen.clear()
            with suppress(_EndOfPass):
                model(batch, use_cache=False)
            if [i for i, _, _ in seen] != list(range(len(blocks))):
                raise LlmqError("the blocks are not called once each, in order")
            assert hidden is not None
            recording.hidden.append(hidden)
            beside = {id(t) for i, part in enumerate(rest) if i != element for t in flat(part) if isinstance(t, Tensor)}
            for i, args, kwargs in seen:
                if found := [v for v in flat((args, kwargs)) if id(v) in beside]:
                    recording.handed[i] = found
            calls = [_cut(args, kwargs, hidden, element) for _, args, kwargs in seen]
            _share(calls, recording.calls[0] if recording.calls else None)
            recording.calls.append(calls)
    return recording


def _shape_of_result(result: Any) -> tuple[type, int | None, tuple[Any, ...]]:
    if isinstance(result, Tensor):
        return Tensor, None, ()
    if type(result) in (tuple, list):
        for i, value in enumerate(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                return type(result), i, tuple(result)
    raise LlmqError(f"a block returns a {type(result).__name__}, in which llmq cannot find the hidden states")


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape:
            return value
    raise LlmqError("no argument of the blocks has the shape of their output")


def _cut(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, element: int | None) -> Call:
    def same(value: Any) -> bool:
        return isinstance(value, Tensor) and value.data_ptr() == hidden.data_ptr() and value.shape == hidden.shape

    for i, value in enumerate(args):
        if same(value):
            return Call((*args[:i], None, *args[i + 1 :]), dict(kwargs), i, element)
    for key, value in kwargs.items():
        if same(value):
            return Call(args, {k: v for k, v in kwargs.items() if k != key}, key, element)
    raise LlmqError("the model changes the hidden states between its blocks, which llmq cannot stream yet")


def _share(calls: list[Call], first: list[Call] | None) -> None:
    # Windows have no padding, so all batches have the same masks and position tables: one copy is kept.
    for i, call in enumerate(calls):
        for others in (calls[:1] if i else [], [first[i]] if first else []):
            for other in others:
                call.args = tuple(
                    _same_or(a, other.args[j]) if j < len(other.args) else a for j, a in enumerate(call.args)
                )
                call.kwargs = {k: _same_or(v, other.kwargs.get(k)) for k, v in call.kwargs.items()}


def _same_or(value: Any, other: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        same = value is other or (
            value.shape == other.shape and value.dtype == other.dtype and bool(torch.equal(value, other))
        )
        return other if same else value
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(_same_or(v, o) for v, o in zip(value, other, strict=True))
    return value
