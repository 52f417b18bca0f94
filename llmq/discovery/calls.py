"""The recording pass: run a model whose blocks only record their arguments, so that each can be run alone later.

Every block's call is kept, because in many models masks and position tables differ between blocks. Some blocks hand
more to later ones than hidden states: in a recorded call such values have a place only (`Handed`), because those of the
recording are not what an earlier block returns when it is really run.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq import machine
from llmq.discovery.handed import (
    Handed,
    Opened,
    Results,
    Store,
    changed,
    containers,
    entries,
    find_handed,
    to_device,
)
from llmq.discovery.matmuls import flat
from llmq.discovery.routers import follow_products
from llmq.errors import LlmqError, first_line
from llmq.spill import Saving, keep, rest, saves


@dataclass
class States:
    """What goes from a block to later ones for one batch: its output hidden states, and all else that is handed on."""

    hidden: Tensor
    handed: Mapping[Handed | Store, Any] = field(default_factory=dict)


@dataclass
class Call:
    """A recorded call: its arguments without the hidden states; `slot` takes them, `element` is their index in the
    result.

    needed: what later blocks take of this block, or of earlier ones; handed: of earlier blocks, once it is known
    (`given`). Every run has its own copy of stores: what a run leaves there does not reach the next.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str
    element: int | None
    needed: tuple[Handed | Store, ...] = ()
    handed: Mapping[Handed | Store, Any] = field(default_factory=dict)

    def given(self, handed: Mapping[Handed | Store, Any]) -> Call:
        """The call with what earlier blocks handed on."""
        return replace(self, handed=handed)

    def sampled(self, samples: Mapping[Handed | Store, Any]) -> Call:
        """The call with samples of what blocks hand on, and the very stores: what a run leaves there stays."""

        def put(value: Any) -> Any:
            return samples[value] if isinstance(value, (Handed, Store)) else value

        return replace(self, args=changed(self.args, put), kwargs=changed(self.kwargs, put))

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for input `hidden` [batch, tokens, width]."""
        return self.hidden(self.result(block, hidden))

    def step(self, block: Callable[..., Any], hidden: Tensor, device: torch.device) -> States:
        """What the block hands to later ones for input `hidden`, run on a device; where the input is, and in its
        dtype."""
        result, stores = self._ran(block, machine.to_device(hidden, device))

        def left(key: Handed | Store) -> Any:
            if key in stores:
                return stores[key].closed(hidden.device)
            if isinstance(key, Store) or key in self.handed:
                return self.handed[key]
            return to_device(find_handed(result, key), hidden.device)

        output = self.hidden(result).to(hidden.dtype)
        stays = hidden.device.type == "cpu" and not saves(Saving.STATES)
        output = machine.to_host(output) if stays else keep(output.to(hidden.device), Saving.STATES)
        return States(output, {key: left(key) for key in self.needed})

    def result(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """All that the block returns for input `hidden`."""
        return self._ran(block, hidden)[0]

    def _ran(self, block: Callable[..., Any], hidden: Tensor) -> tuple[Any, dict[Handed | Store, Opened]]:
        device = hidden.device
        rest(Saving.STATES)
        stores: dict[Handed | Store, Opened] = {}

        def ready(value: Any) -> Any:
            if isinstance(value, Store):
                if value not in stores:
                    stores[value] = Opened(self.handed[value], device)
                return stores[value].store
            if isinstance(value, Handed):
                return to_device(self.handed[value], device)
            return value.to(device) if isinstance(value, Tensor) else value

        args, kwargs = [changed(a, ready) for a in self.args], {k: changed(v, ready) for k, v in self.kwargs.items()}
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        return block(*args, **kwargs), stores

    def hidden(self, result: Any) -> Tensor:
        """The hidden states in what a block returned."""
        output: Tensor = result if self.element is None else result[self.element]
        return output


@dataclass
class Recording:
    """The result of the recording pass: for each batch, the first block's input and every block's call.

    stores: what is in stores before the first block, per batch; samples: a value for each of those that blocks hand on,
    of the right shape and dtype: the first block's, once; and the stores of the first batch.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    stores: list[dict[Handed | Store, Any]] = field(default_factory=list)
    samples: dict[Handed | Store, Any] = field(default_factory=dict)

    def states(self) -> list[States]:
        """What the first block gets, batch by batch."""
        return [States(hidden, stores) for hidden, stores in zip(self.hidden, self.stores, strict=False)]

    def of_block(self, index: int, states: list[States]) -> list[Call]:
        """One block's calls, batch by batch, with what the blocks before it handed on."""
        return [calls[index].given(one.handed) for calls, one in zip(self.calls, states, strict=False)]

    @property
    def nbytes(self) -> int:
        """The bytes of what goes from a block to later ones for the first batch, at most, with what is in stores."""

        def size(key: Handed | Store) -> int:
            if isinstance(key, Handed):
                return int(self.samples[key].nbytes)
            before = {id(value) for _, value in entries(self.stores[0][key])}
            new = [value for _, value in entries(self.samples[key]) if id(value) not in before]
            return sum(value.nbytes for value in flat(new) if isinstance(value, Tensor))

        return self.hidden[0].nbytes + max(sum(map(size, call.needed)) for call in self.calls[0])

    def sampled(self) -> list[Call]:
        """Every block's call of the first batch, to be run alone: with samples of what blocks hand on."""
        return [call.sampled(self.samples) for call in self.calls[0]]


class Unreached(LlmqError):
    """Not all blocks are called, but the others once each, in order. called: their indices."""

    def __init__(self, called: list[int], count: int) -> None:
        super().__init__(f"only {len(called)} of {count} blocks are called on text alone")
        self.called = called


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

    with torch.no_grad(), replaced_forwards([block], make), suppress(_EndOfPass):
        model(input_ids=batch, use_cache=False)


Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(modules: list[nn.Module], make: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Within the context, each module runs what `make` returns for its index and its own forward."""
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
    returned: Mapping[int, Any] | None = None,
) -> Recording:
    """Run the model once per batch of token ids [batch, tokens] with blocks that only record their arguments.

    Only the first block really runs, once, to see what a block returns: its parameters and everything before the blocks
    must be in memory. `whole`: continue past the last block to the output embedding, to detect blocks that are called
    again; `first`: what runs instead of the first block; `returned`: what blocks return that return something else
    than the first, by their index. Raises LlmqError if the blocks are not called once each, in order, each on the
    output of the one before; Unreached if only some are called.
    """
    recording = Recording()
    results: Results | None = None
    seen: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
    stores: dict[int, tuple[Any, Any]] = {}
    hidden: Tensor | None = None

    def make(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal results, hidden
            if len(seen) >= len(blocks):
                raise LlmqError("the blocks are called more than once per pass, which llmq cannot stream yet")
            seen.append((i, args, kwargs))
            for store in containers(args, kwargs):
                stores.setdefault(id(store), (store, copy.copy(store)))
            if i == 0 and results is None:
                result = (first or original)(*args, **kwargs)
                results = Results(result, [*args, *kwargs.values()], following, returned or {})
                hidden = _hidden_of(args, kwargs, results.hidden.shape)
            elif i == 0:
                assert recording.calls
                slot = recording.calls[0][0].slot
                hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
            if i == len(blocks) - 1 and not whole:
                raise _EndOfPass
            assert results is not None
            return results.of(i, hidden)

        return forward

    head = getattr(model, "get_output_embeddings", lambda: None)()
    stoppers = [head] if isinstance(head, nn.Module) else []

    def stop(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _EndOfPass

        return forward

    watched = follow_products(nn.Module()) if whole else nullcontext()
    with torch.no_grad(), replaced_forwards(blocks, make), replaced_forwards(stoppers, stop), watched as following:
        for batch in batches:
            seen.clear()
            stores.clear()
            with suppress(_EndOfPass):
                model(input_ids=batch, use_cache=False)
            if (called := [i for i, _, _ in seen]) != list(range(len(blocks))):
                if whole and called and called[0] == 0 and sorted(set(called)) == called:
                    raise Unreached(called, len(blocks))
                raise LlmqError("the blocks are not called once each, in order")
            assert hidden is not None and results is not None
            recording.hidden.append(keep(hidden, Saving.STATES))
            calls = [_cut(*results.marked(args, kwargs), hidden, results.element) for _, args, kwargs in seen]
            places = _mark_stores(calls, stores)
            recording.stores.append({place: before for place, (_, before) in places.items()})
            recording.samples = _set_needed(calls, results) | recording.samples
            recording.samples = {place: store for place, (store, _) in places.items()} | recording.samples
            results.known.clear()
            _share(calls, recording.calls[0] if recording.calls else None)
            recording.calls.append(calls)
    return recording


def handed_in(call: Call) -> list[Handed | Store | None]:
    """Everything in a call, in order: the place of what an earlier block hands on, or None for what it does not."""
    return [value if isinstance(value, (Handed, Store)) else None for value in flat((call.args, call.kwargs))]


def _mark_stores(calls: list[Call], stores: dict[int, tuple[Any, Any]]) -> dict[Handed | Store, tuple[Any, Any]]:
    """Put places into the calls for those dicts and lists that several have; returns each with what was in it before.

    stores: all dicts and lists in the calls, by their identity, with what was in them.
    """
    found = Counter(key for call in calls for key in {id(store) for store in containers(call.args, call.kwargs)})
    places = {key: Store(i) for i, key in enumerate(key for key in stores if found[key] > 1)}
    for call in calls:
        call.args = tuple(places.get(id(value), value) for value in call.args)
        call.kwargs = {name: places.get(id(value), value) for name, value in call.kwargs.items()}
    return {place: stores[key] for key, place in places.items()}


def _set_needed(calls: list[Call], results: Results) -> dict[Handed | Store, Any]:
    """Note in every call what later ones take of its result or of earlier ones; returns a sample of each value."""
    needed: dict[Handed | Store, None] = {}
    samples: dict[Handed | Store, Any] = {}
    for i, call in reversed(list(enumerate(calls))):
        call.needed = tuple(key for key in needed if isinstance(key, Store) or key.block <= i)
        taken = dict.fromkeys(key for key in handed_in(call) if key is not None)
        needed |= taken
        samples |= {key: results.sample(key) for key in taken if isinstance(key, Handed)}
    return samples


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
