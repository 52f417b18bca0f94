"""SignRound on a block of its own: what it lowers, what it leaves alone, and that it repeats itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.block.block import Block, WeightState
from llmq.discovery.calls import Call
from llmq.discovery.view import View
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.signround import SignRound


class Toy(nn.Module):
    """Two weights with something between them that is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(torch.nn.functional.silu(self.first(hidden)))


def block_of(scheme: Scheme, batches: int = 8) -> Block:
    generator = torch.Generator().manual_seed(0)
    module = Toy()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    mix = torch.randn(16, 16, generator=generator)
    inputs = [torch.randn(1, 24, 16, generator=generator) @ mix for _ in range(batches)]
    linears = {"first.weight": module.first, "second.weight": module.second}
    states = [
        WeightState(n, View(n), scheme, value=m.weight.data.clone(), dtype=m.weight.dtype, input_id=i)
        for i, (n, m) in enumerate(linears.items())
    ]
    block = Block(module, states, inputs, [Call((None,), {}, 0, None)] * batches)
    block.target = block.outputs()
    for state in states:
        state.quantized = round_to_nearest(state.value, scheme, block.scale_dtype)
    return block


def codes(block: Block) -> list[Tensor]:
    found = [state.quantized for state in block.weights.values()]
    return [q.codes for q in found if isinstance(q, QuantizedWeight)]


def test_the_block_gets_nearer_to_its_target_on_batches_held_out_and_all() -> None:
    block = block_of(Scheme(3, 8))
    before, start = block.error(), codes(block)
    SignRound(iterations=100, minibatch=2).refine(block)
    assert block.error() < 0.95 * before
    assert any(not torch.equal(a, b) for a, b in zip(start, codes(block), strict=True))


def test_the_same_seed_gives_the_same_bytes_and_the_module_is_as_it_was() -> None:
    results = []
    for _ in range(2):
        block = block_of(Scheme(2, 8, symmetric=False))
        weights = [p.data.clone() for p in block.module.parameters()]
        SignRound(iterations=20, seed=3).refine(block)
        results.append([(w.quantized.codes, w.quantized.scale) for w in block.weights.values()])
        for was, parameter in zip(weights, block.module.parameters(), strict=True):
            assert torch.equal(was, parameter.data)
            assert not parameter.requires_grad and parameter.grad is None
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_where_nothing_helps_the_start_is_kept() -> None:
    block = block_of(Scheme(3, 8))
    with block.rounding():
        block.target = block.outputs()
    start = codes(block)
    SignRound(iterations=10, reach=5.0).refine(block)
    assert all(torch.equal(a, b) for a, b in zip(start, codes(block), strict=True))


def test_gradients_pass_the_rounding_of_inputs() -> None:
    scheme = Scheme(8, None, activations=Activations())
    block = block_of(scheme)
    # Only the first weight is far off, and its gradient comes through the rounded input of the second.
    state = block.weights["first.weight"]
    state.quantized = round_to_nearest(state.value * 1.1, scheme, block.scale_dtype)
    before = block.error()
    SignRound(iterations=60, reach=0.0, scale_reach=0.3).refine(block)
    assert block.error() < 0.5 * before
