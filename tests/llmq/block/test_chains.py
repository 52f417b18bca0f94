"""The two chains of a block: what is kept of the unquantized one, and that runs leave the block as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmq.block import chains
from llmq.block.block import Block, WeightState
from llmq.block.chains import Chains, replayed, run_unquantized, stages
from llmq.discovery.calls import Call
from llmq.discovery.view import View
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme

WIDTH = 8


class Layer(nn.Module):
    """One parameter that holds two weights, and one that is defined first and used last."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.both = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        a, b = nn.functional.linear(x.tanh(), self.both).chunk(2, -1)
        return x + self.out(a * b.sigmoid())


def opened(count: int = 3) -> Block:
    torch.manual_seed(0)
    layer = Layer().requires_grad_(False)
    views = [View("out.weight"), View("both", rows=(0, WIDTH)), View("both", rows=(WIDTH, 2 * WIDTH))]
    states = [
        WeightState(view.name, view, Scheme(3, None), view.get(layer), torch.float32, int(i == 0))
        for i, view in enumerate(views)
    ]
    exact = [torch.randn(2, 5, WIDTH) for _ in range(count)]
    calls = [Call((None,), {}, 0, None)] * count
    return Block(layer, states, [h + 0.1 for h in exact], calls, unquantized=(exact, calls))


def test_stages_of_parts_of_a_parameter() -> None:
    block = opened()
    assert [[state.name for state in stage] for stage in stages(block)] == [
        ["both[0:8]", "both[8:16]"],
        ["out.weight"],
    ]


def test_a_weight_that_the_batch_does_not_use_comes_last() -> None:
    block = opened()
    idle = WeightState("idle", View("idle"), Scheme(3, None), torch.zeros(4, 4), torch.float32, 7)
    block.module.register_parameter("idle", nn.Parameter(idle.value, requires_grad=False))
    block.weights = {"idle": idle, **block.weights}
    assert [stage[0].name for stage in stages(block)] == ["both[0:8]", "out.weight", "idle"]


@pytest.mark.parametrize("room", [0, 2**30])
def test_both_chains(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "ROOM", room)
    block = opened()
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    kept = Chains(block)
    first, last = stages(block)
    for state in first:
        block.set_quantized(state.parameter, round_to_nearest(state.value, state.scheme, torch.float32))
    kept.round(first)
    twin = Layer().requires_grad_(False)
    twin.load_state_dict(before)
    inner = {}
    twin.out.register_forward_hook(lambda _, args, __: inner.update(x=args[0]))
    counts = None
    for index in range(3):
        exact, found, counts = kept.see(last, index, counts)
        assert block.unquantized is not None
        for seen, hidden, rounded in ((exact, block.unquantized[0], False), (found, block.inputs, True)):
            twin.load_state_dict(before)
            if rounded:
                for state in first:
                    state.view.set(twin, state.result())
            twin(hidden[index])
            torch.testing.assert_close(seen[0].rows, inner["x"].flatten(0, 1))
            torch.testing.assert_close(seen[0].stream, hidden[index].flatten(0, 1))
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_pass_for_the_target_is_not_repeated() -> None:
    block = opened()
    assert block.unquantized is not None
    inputs, calls = block.unquantized
    target = run_unquantized(block, lambda i: calls[i].run(block.module, inputs[i]))
    assert [t.shape for t in target] == [(2, 5, WIDTH)] * 3 and block.module.runs == 3
    kept = Chains(block)
    for index in range(3):
        kept.see(stages(block)[0], index, None)
    # One run for each call of `stages`, one of the quantized chain each.
    assert block.module.runs == 3 + 3 + 3


def test_too_much_is_not_kept_but_every_batch_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    block = opened()
    one = 2 * 5 * WIDTH * 4
    # The shared input, that of the last weight, and the stream, of three batches.
    monkeypatch.setattr(chains, "ROOM", 3 * 3 * one - 1)
    assert len(run_unquantized(block, lambda i: block.output(i))) == 3 and block.shown is None
    monkeypatch.setattr(chains, "ROOM", 3 * 3 * one)
    run_unquantized(block, lambda i: block.output(i))
    assert block.shown is not None


def test_what_was_kept_is_dropped_when_the_block_changes() -> None:
    block = opened()
    run_unquantized(block, lambda i: block.output(i))
    block.set("out.weight", block.get("out.weight") * 2)
    assert block.shown is None
    with block.trial():
        run_unquantized(block, lambda i: block.output(i))
    assert block.shown is None


@pytest.mark.parametrize("room", [0, 2**20])
def test_a_run_of_the_rounded_block_does_not_repeat_products(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "REPLAYED", room)
    block = opened()
    kept = Chains(block)
    for stage in stages(block):
        for index in range(3):
            kept.see(stage, index, None)
        for state in stage:
            block.set_quantized(state.parameter, round_to_nearest(state.value, state.scheme, torch.float32))
        kept.round(stage)
    block.round_in_place()
    assert block.replays is not None
    for index in range(3):
        assert len(block.replays[index].kept) == (1 if room else 0)
        with replayed(block, index):
            found = block.output(index)
        assert torch.equal(found, block.output(index))
    block.set("out.weight", block.get("out.weight"))
    assert block.replays is None
