"""Blocks that hand more to later ones than hidden states: replayed one by one, they give what the model gives."""

from __future__ import annotations

from collections import UserDict
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery.blocks import find
from llmq.discovery.calls import Call, Recording, record
from llmq.discovery.handed import Handed, Opened, Store, changed, find_handed
from llmq.errors import LlmqError
from tests.llmq.refusal import refused

WIDTH, CPU = 32, torch.device("cpu")


class Block(nn.Module):
    """Computes with what it is handed. makes: what it hands on: 'own', what it 'got', 'both' (two) or 'nothing'."""

    def __init__(self, makes: str) -> None:
        super().__init__()
        self.linear, self.other, self.makes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), makes

    def forward(self, hidden: Tensor, got: Any = None, scale: float = 1.0) -> tuple[Any, ...]:
        parts = [] if got is None else [got] if isinstance(got, Tensor) else list(got)
        for i, part in enumerate(parts):
            hidden = hidden + (i + 1.0) * part * scale
        own = self.other(hidden.detach()).tanh()
        out = hidden + self.linear(hidden).tanh()
        return out, {"own": own, "got": got, "both": (own, own.cos()), "nothing": None}[self.makes]


class Silent(Block):
    """Blocks of one class, size and call are taken to return the same."""


class Model(nn.Module):
    """Three or more blocks; `how` the model passes on what they return: to the next block, or in other ways."""

    def __init__(self, how: str, *makes: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16)
        self.layers, self.how = nn.ModuleList((Silent if one == "nothing" else Block)(one) for one in makes), how

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        hidden, value, all_values = self.embed(input_ids), None, []
        for block in self.layers:
            if self.how == "by name":
                hidden, found = block(hidden, **({} if value is None else {"got": value}))
            else:
                hidden, found = block(hidden, (value, value) if self.how == "pairs" and value is not None else value)
            all_values.append(found)
            value = {
                "of the first": all_values[0],
                "last there is": value if found is None else found,
                "of the one before": all_values[-2] if len(all_values) > 1 else None,
                "unused": None,
                "twice": None if found is None else found * 2,
                "listed": [found],
                "in a dict": {"value": found},
            }.get(self.how, found)
            if self.how == "in a dict":
                value = list(value.values())
        out: Tensor = self.head(hidden)
        return out


def batches() -> list[Tensor]:
    return [torch.arange(5)[None], torch.arange(7, 12)[None]]


def replayed(model: Model, recording: Recording) -> list[Tensor]:
    """The logits of all batches, block after block."""
    states = recording.states()
    with torch.no_grad():
        for i, block in enumerate(model.layers):
            calls = recording.of_block(i, states)
            states = [call.step(block, one.hidden, CPU) for call, one in zip(calls, states, strict=True)]
        return [model.head(one.hidden) for one in states]


def agrees(model: Model) -> Recording:
    """Recorded and replayed, a model computes what it computes: to the bit; and blocks without memory are no matter."""
    recording = record(model, list(model.layers), batches())
    with torch.no_grad():
        wanted = [model(ids, use_cache=False) for ids in batches()]
    for got, want in zip(replayed(model, recording), wanted, strict=True):
        assert torch.equal(got, want)
    return recording


@pytest.mark.parametrize("how", ["usual", "by name", "of the first", "of the one before", "unused"])
@pytest.mark.parametrize("makes", [["own"] * 4, ["own", "got", "own", "got"], ["own", "got", "got", "got"]])
def test_values_go_to_the_block_that_takes_them(makes: list[str], how: str) -> None:
    recording = agrees(Model(how, *makes))
    takes = [sorted(key.block for key in call.needed if isinstance(key, Handed)) for call in recording.calls[0]]
    kept = {"of the first": [[0], [0], [0], []], "of the one before": [[0], [0, 1], [1], []], "unused": [[]] * 4}
    assert takes == kept.get(how, [[0], [1], [2], []])


def test_a_pair_is_handed_on_part_by_part() -> None:
    for model in (Model("usual", *["both"] * 4), Model("usual", "both", "got", "both", "got")):
        recording = agrees(model)
        assert [len(call.needed) for call in recording.calls[0]] == [2, 2, 2, 0]
    agrees(Model("pairs", *["own"] * 4))


def test_what_was_recorded_is_not_what_is_replayed() -> None:
    """Every other value than that of the first block, of the first batch, would be stale."""
    model = Model("usual", "own", "own", "own")
    recording = record(model, list(model.layers), batches())
    with torch.no_grad():
        stale = recording.hidden[1]
        for block, call in zip(model.layers, recording.sampled(), strict=True):
            stale = call.run(block, stale)
        want = model(batches()[1], use_cache=False)
    assert not torch.allclose(model.head(stale), want, atol=1e-2)


def test_what_a_call_keeps_of_the_recording_is_a_place() -> None:
    model = Model("by name", "own", "own", "own")
    recording = record(model, list(model.layers), batches())
    first, second, _ = recording.calls[1]
    assert "got" not in first.kwargs
    key = second.kwargs["got"]
    assert isinstance(key, Handed) and key.block == 0 and key.path[0].idx == 1
    assert list(recording.samples) == [first.needed[0], second.needed[0]] or len(recording.samples) == 2
    with pytest.raises(KeyError):
        second.given({}).run(model.layers[1], recording.hidden[0])


def test_the_bytes_between_blocks_are_counted() -> None:
    for how, values in (("unused", 1), ("usual", 2), ("of the one before", 3)):
        model = Model(how, "own", "own", "own", "own")
        recording = record(model, list(model.layers), batches())
        assert recording.nbytes == values * 5 * WIDTH * 4


@pytest.mark.parametrize("how", ["twice", "listed", "in a dict"])
def test_what_cannot_be_followed_is_refused(how: str) -> None:
    model = Model(how, "own", "own", "own").to("meta")
    refused(lambda: find(model), "a second value", "cannot stream yet")


class Loose(Block):
    """Returns its value in a list."""

    def forward(self, hidden: Tensor, got: Any = None, scale: float = 1.0) -> tuple[Any, ...]:
        out, own = super().forward(hidden, got, scale)
        return out, [own]


def test_values_that_a_block_returns_in_a_list_are_refused_where_a_later_one_gets_them() -> None:
    for how in ("usual", "unused"):
        model = Model(how, "own", "own", "own")
        model.layers = nn.ModuleList(Loose("own") for _ in range(3))
        if how == "usual":
            refused(partial(find, model.to("meta")), "in a list or dict")
        else:
            assert len(find(model.to("meta")).blocks) == 3


@pytest.mark.parametrize(
    ("how", "makes"),
    [
        ("usual", ["nothing", "own", "own"]),  # the first shows nothing of what others hand on
        ("last there is", ["own", "nothing", "own", "own"]),  # nothing is what the model's loop passes over
        ("usual", ["own", "both", "own", "own"]),
    ],
)
def test_blocks_that_hand_on_something_else_than_the_first_are_refused(how: str, makes: list[str]) -> None:
    refused(lambda: find(Model(how, *makes).to("meta")), "than the first block hands on", "cannot stream yet")


@pytest.mark.parametrize("makes", [["nothing", "own", "own"], ["own", "nothing", "both"]])
def test_what_no_block_takes_may_be_of_any_kind(makes: list[str]) -> None:
    assert len(find(Model("unused", *makes).to("meta")).blocks) == 3


def test_structure_is_found_with_samples() -> None:
    """Blocks run alone on zeros: all products are seen, and parameters stay without memory."""
    structure = find(model := Model("usual", "own", "own", "got").to("meta"))
    assert [len(block.weights) for block in structure.blocks] == [2, 2, 2]
    assert all(p.is_meta for p in model.parameters())


def test_a_result_without_the_value_is_named() -> None:
    recording = record(model := Model("usual", "own", "own"), list(model.layers), batches())
    (key,) = recording.calls[0][0].needed
    assert isinstance(key, Handed)
    assert find_handed((1, 2), key) == 2
    refused(lambda: find_handed((1,), key), "block 0 does not return what later blocks take")


def test_where_the_input_is_there_is_what_is_handed_on() -> None:
    """A block of half precision on another device gives back the dtype of hidden states, and values as they are."""
    key = Handed(0, ())

    def block(hidden: Tensor) -> Tensor:
        return hidden.double()

    states = Call((None,), {}, 0, None, (key,)).step(block, torch.ones(1, 2), CPU)
    assert states.hidden.dtype == torch.float32
    assert states.handed[key].dtype == torch.float64
    passed = Call((None,), {}, 0, None, (key,)).given({key: torch.ones(3)}).step(block, torch.ones(1, 2), CPU)
    assert passed.handed[key].shape == (3,)


def test_only_what_changes_is_made_anew() -> None:
    store = {"a": [1, (2, 3)]}
    assert changed(store, lambda v: v) is store
    assert changed(store, lambda v: v + 1) == {"a": [2, (3, 4)]} and store == {"a": [1, (2, 3)]}
    assert changed((1, [1]), lambda v: v if isinstance(v, list) else v + 1, (tuple,)) == (2, [1])


class Leaves(nn.Module):
    """Leaves a value for later blocks in a store, and computes with what others left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, store: Any) -> Tensor:
        left = [*store] if isinstance(store, list) else [store[key] for key in store if key != "table"]
        for i, value in enumerate(left):
            hidden = hidden + (i + 1.0) * value
        own = self.linear(hidden).tanh()
        if isinstance(store, list):
            store.append(own)
        else:
            store["last" if len(store) > 2 else str(len(store))] = own
        out: Tensor = hidden + own * (1.0 if isinstance(store, list) else store["table"])
        return out


class Stores(Model):
    def __init__(self, kind: Any) -> None:
        super().__init__("usual", "own")
        self.layers, self.kind = nn.ModuleList(Leaves() for _ in range(4)), kind

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        hidden, table = self.embed(input_ids), torch.linspace(0.5, 1.5, WIDTH)
        store: Any = [table] if self.kind is list else self.kind({"table": table})
        for block in self.layers:
            hidden = block(hidden, store)
        out: Tensor = self.head(hidden)
        return out


@pytest.mark.parametrize("kind", [dict, UserDict, list])
def test_each_chain_has_stores_of_its_own(kind: Any) -> None:
    """Whatever runs between: other runs of the block, or another chain, as that of the unquantized model."""
    model = Stores(kind)
    recording = record(model, list(model.layers), batches())
    other, states = [replace(s, hidden=s.hidden * 3) for s in recording.states()], recording.states()
    with torch.no_grad():
        for i, block in enumerate(model.layers):
            calls = recording.of_block(i, states)
            for call, one in zip(calls, states, strict=True):
                call.run(block, one.hidden * 2)
            states = [call.step(block, one.hidden, CPU) for call, one in zip(calls, states, strict=True)]
            calls = recording.of_block(i, other)
            other = [call.step(block, one.hidden, CPU) for call, one in zip(calls, other, strict=True)]
        for one, ids in zip(states, batches(), strict=True):
            assert torch.equal(model.head(one.hidden), model(ids, use_cache=False))


def test_what_lies_in_a_store_already_stays_the_same_tensor() -> None:
    """Tables are not copied from block to block, nor from batch to batch of one chain."""
    model = Stores(dict)
    recording = record(model, list(model.layers), batches())
    table = recording.stores[0][Store(0)]["table"]
    states = recording.states()
    for i, block in enumerate(list(model.layers)[:-1]):
        calls = recording.of_block(i, states)
        states = [call.step(block, one.hidden, CPU) for call, one in zip(calls, states, strict=True)]
        assert states[0].handed[Store(0)]["table"] is table
    assert list(recording.stores[0][Store(0)]) == ["table"]
    # The first block ran while its call was recorded, and left something in the store of the first batch.
    assert recording.nbytes == 2 * 5 * WIDTH * 4


@pytest.mark.parametrize("kind", [dict, UserDict, list])
def test_a_store_is_opened_on_the_device_of_the_block(kind: Any) -> None:
    """What is new is moved where it is kept; what was there is not moved back, but is the tensor that it was."""
    table, pair = torch.ones(2), (torch.ones(3), "x")
    before = [table, pair] if kind is list else kind({0: table, 1: pair})
    opened = Opened(before, torch.device("meta"))
    assert type(opened.store) is kind and opened.store[0].is_meta and opened.store[1][0].is_meta
    opened.store[1] = torch.zeros(4)
    after = opened.closed(torch.device("meta"))
    assert type(after) is kind and after[0] is table and after[1].is_meta
    assert before[0] is table and before[1] is pair


def test_a_container_of_one_call_alone_is_none() -> None:
    model = Model("usual", "own", "own")

    class Own(Model):
        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
            hidden = self.embed(input_ids)
            for block in self.layers:
                hidden = block(hidden, {"value": torch.zeros(1)})[0]
            out: Tensor = self.head(hidden)
            return out

    class Takes(Block):
        def forward(self, hidden: Tensor, got: Any = None, scale: float = 1.0) -> tuple[Any, ...]:
            return super().forward(hidden, got["value"], scale)

    model = Own("usual", "own", "own")
    model.layers = nn.ModuleList([Takes("own"), Takes("own")])
    recording = agrees(model)
    assert recording.stores == [{}, {}] and not recording.samples


def test_errors_of_a_block_are_its_own() -> None:
    def broken(hidden: Tensor) -> Tensor:
        raise LlmqError("as it is")

    refused(lambda: Call((None,), {}, 0, None).step(broken, torch.ones(1, 2), CPU), "as it is")
