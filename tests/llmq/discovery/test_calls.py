"""The skeleton pass: each block's own call is kept, and replayed alone it gives what the whole model gives."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery.calls import Call, Recording, Unreached, of_length, record
from llmq.errors import LlmqError
from tests.llmq.refusal import refused

WIDTH = 6


class Block(nn.Module):
    """Adds what it was told to. returns: 'tensor', 'tuple', 'list', 'mapping', 'ids' or 'narrow'."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.linear, self.returns = nn.Linear(WIDTH, WIDTH), returns

    def forward(self, hidden: Tensor, mask: Tensor, tables: Any = None, times: float = 1.0) -> Any:
        out = hidden + times * self.linear(hidden) * mask + (0 if tables is None else tables[0])
        kinds = {"tensor": out, "tuple": (None, out, "x"), "list": [out], "mapping": {"hidden": out}}
        return (kinds | {"ids": (torch.ones(3, dtype=torch.int64),), "narrow": out[..., 1:]})[self.returns]


class Model(nn.Module):
    """Some blocks behind an embedding, before a head. how: what the model does with them."""

    def __init__(self, returns: str = "tensor", how: str = "usual") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16)
        self.layers = nn.ModuleList(Block(returns) for _ in range(3))
        self.how, self.ended = how, 0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        assert not use_cache
        hidden = self.embed(input_ids)
        order = {"backwards": [0, 2, 1], "twice": [0, 1, 2, 0, 1, 2], "fewer": [0, 1]}.get(self.how, [0, 1, 2])
        for i in order:
            mask = torch.full((input_ids.shape[-1], 1), float(i % 2 + 1))
            given = {"mask": mask, "tables": (torch.ones(WIDTH) * 0.5,), "times": i + 1.0}
            if self.how == "by name":
                given["hidden"] = hidden
                found = self.layers[i](**given)
            else:
                found = self.layers[i](hidden, **given)
            hidden = found if isinstance(found, Tensor) else next(v for v in found if isinstance(v, Tensor))
            hidden = hidden * 2 if self.how == "between" else hidden
        out: Tensor = self.head(hidden)
        self.ended += 1
        return out


def batches(count: int = 2) -> list[Tensor]:
    return [torch.arange(5)[None] + i for i in range(count)]


def replayed(model: Model, recording: Recording, batch: int) -> Tensor:
    """The logits, block after block, each by its own call."""
    hidden = recording.hidden[batch]
    with torch.no_grad():
        for block, call in zip(model.layers, recording.calls[batch], strict=True):
            hidden = call.run(block, hidden)
        out: Tensor = model.head(hidden)
    return out


@pytest.mark.parametrize("how", ["usual", "by name"])
@pytest.mark.parametrize("returns", ["tensor", "tuple", "list"])
def test_blocks_run_alone_give_what_the_model_gives(returns: str, how: str) -> None:
    torch.manual_seed(0)
    model = Model(returns, how)
    recording = record(model, list(model.layers), batches())
    assert len(recording.hidden) == len(recording.calls) == 2
    for i, ids in enumerate(batches()):
        with torch.no_grad():
            assert torch.equal(replayed(model, recording, i), model(ids, use_cache=False))
    call = recording.calls[0][1]
    assert call.slot == ("hidden" if how == "by name" else 0)
    assert call.element == {"tensor": None, "tuple": 1, "list": 0}[returns]


def test_the_input_of_the_first_block_is_what_stands_before_it() -> None:
    model = Model()
    recording = record(model, list(model.layers), batches())
    for hidden, ids in zip(recording.hidden, batches(), strict=True):
        assert torch.equal(hidden, model.embed(ids))


def test_only_the_first_block_ever_runs_and_the_head_never() -> None:
    """What is behind the first block may be on the meta device."""
    model = Model()
    for block in list(model.layers)[1:]:
        block.to("meta")
    model.head.to("meta")
    for whole in (False, True):
        record(model, list(model.layers), batches(), whole=whole)
    assert model.ended == 0


def test_nothing_of_the_model_is_left_changed() -> None:
    model = Model(how="backwards")
    refused(lambda: record(model, list(model.layers), batches()), "not called once each, in order")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_the_same_for_all_is_kept_once() -> None:
    recording = record(model := Model(), list(model.layers), batches(3))
    masks = [[call.kwargs["mask"] for call in calls] for calls in recording.calls]
    assert masks[0][0] is masks[1][0] is masks[2][0] is masks[0][2]
    assert masks[0][1] is masks[2][1] and masks[0][1] is not masks[0][0]
    tables = [call.kwargs["tables"][0] for calls in recording.calls for call in calls]
    assert all(table is tables[0] for table in tables)


def test_a_mask_of_its_own_stays() -> None:
    model = Model()
    recording = record(model, list(model.layers), [torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 3).long()])
    assert [calls[0].kwargs["mask"].shape[0] for calls in recording.calls] == [5, 3]


@pytest.mark.parametrize(
    ("returns", "how", "words"),
    [
        ("mapping", "usual", "a block returns a dict, in which llmq cannot find the hidden states"),
        ("ids", "usual", "a block returns a tuple"),
        ("narrow", "usual", "no argument of the blocks has the shape of their output"),
        ("tensor", "between", "changes the hidden states between its blocks"),
        ("tensor", "fewer", "not called once each, in order"),
    ],
)
def test_models_that_cannot_be_streamed(returns: str, how: str, words: str) -> None:
    model = Model(returns, how)
    refused(lambda: record(model, list(model.layers), batches()), words)


def test_blocks_that_are_not_called_are_told_where_the_whole_pass_is_run() -> None:
    model = Model(how="fewer")
    with pytest.raises(Unreached, match="only 2 of 3 blocks are called on text alone") as caught:
        record(model, list(model.layers), batches(), whole=True)
    assert caught.value.called == [0, 1]
    model = Model(how="backwards")  # no order to stream them in
    refused(lambda: record(model, list(model.layers), batches(), whole=True), "not called once each, in order")


def test_blocks_called_again_are_seen_where_the_whole_pass_is_run() -> None:
    model = Model(how="twice")
    refused(lambda: record(model, list(model.layers), batches(), whole=True), "called more than once per pass")


def test_a_call_puts_the_hidden_states_into_its_slot() -> None:
    def block(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return args, kwargs, torch.tensor(7.0)

    hidden = torch.ones(1, 2, 3)
    there: Any = Call(("a", None), {"b": 1}, 1, 0).run(block, hidden)  # type: ignore[arg-type]
    assert there[0] == "a" and there[1] is hidden
    named: Any = Call(("a",), {"b": 1}, "x", 1).run(block, hidden)  # type: ignore[arg-type]
    assert named == {"b": 1, "x": hidden}
    assert Call((), {}, "x", 2).run(block, hidden).item() == 7.0  # type: ignore[arg-type]


Point = namedtuple("Point", "x y")


def test_arguments_follow_the_hidden_states_to_their_device() -> None:
    """What is there already is handed on as the very same object: blocks leave things in it for later ones."""
    seen: dict[str, Any] = {}

    def block(hidden: Tensor, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return hidden

    store: dict[str, Any] = {"values": None}
    given = {"store": store, "point": Point(torch.ones(2), 3), "list": [torch.ones(1)], "text": "x"}
    call = Call((None,), given, 0, None)
    call.run(block, torch.ones(1))  # type: ignore[arg-type]
    assert all(seen[key] is value for key, value in given.items())
    call.run(block, torch.ones(1, device="meta"))  # type: ignore[arg-type]
    assert seen["store"] is store and type(seen["point"]) is Point and seen["point"].y == 3
    assert seen["point"].x.device.type == seen["list"][0].device.type == "meta"
    assert given["list"][0].device.type == "cpu"


@pytest.mark.parametrize(
    "error", [IndexError("index out of range\nin self"), RuntimeError("can't allocate memory"), KeyError("x")]
)
def test_a_failure_at_full_length_is_one_line(error: Exception) -> None:
    def fail(error: Exception) -> None:
        with of_length("a block", 4096):
            raise error

    refused(lambda: fail(error), "a block fails on windows of 4096 tokens", type(error).__name__, "--seqlen")
    refused(lambda: fail(LlmqError("as it is")), "as it is")


def test_another_function_may_run_instead_of_the_first_block() -> None:
    model, seen = Model("tuple"), []
    blocks = list(model.layers)

    def first(hidden: Tensor, **given: Any) -> tuple[None, Tensor, str]:
        seen.append(sorted(given))
        return None, torch.zeros_like(hidden), "x"

    ids = torch.arange(5)[None]
    mine, usual = record(model, blocks, [ids, ids], first=first), record(model, blocks, [ids, ids])
    assert len(seen) == 1 and "mask" in seen[0]
    assert torch.equal(mine.hidden[0], usual.hidden[0])
    assert [(c.slot, c.element) for c in mine.calls[1]] == [(c.slot, c.element) for c in usual.calls[1]]
