"""A group of experts as a block: the statistics of its own rows alone, counted, and nothing of the block changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmq.block.block import WeightState
from llmq.block.group import GroupBlock
from llmq.block.statistics import Hessian, Inputs, MeanSquare
from llmq.discovery.calls import Call
from llmq.discovery.view import View
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.methods import make
from llmq.recipe.recipe import Recipe
from llmq.streaming import steps

COUNT, WIDTH, INNER, TOKENS = 4, 16, 24, 30
W4 = Scheme(4, 8)
IDLE = 3


class Toy(nn.Module):
    """Every token goes to the expert of its number modulo 3; expert 3 is idle.

    at_once: one product over all experts, stored as [in, out], of rows that are 0 if they are not chosen; else one by
    one, stored as [out, in].
    """

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [(COUNT, WIDTH, INNER), (COUNT, INNER, WIDTH)]
        up, down = (torch.randn(shape, generator=generator) / 4 for shape in shapes)
        self.at_once = at_once
        self.up = nn.Parameter(up if at_once else up.mT.contiguous(), requires_grad=False)
        self.down = nn.Parameter(down if at_once else down.mT.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        chosen = torch.arange(len(rows)) % 3 == torch.arange(COUNT)[:, None]
        if self.at_once:
            inner = torch.bmm(rows * chosen[:, :, None], self.up).relu()
            return torch.bmm(inner, self.down).sum(0).reshape(x.shape)
        total = torch.zeros_like(rows)
        for e in range(COUNT):
            inner = nn.functional.linear(rows[chosen[e]], self.up[e]).relu()
            total[chosen[e]] += nn.functional.linear(inner, self.down[e])
        return total.reshape(x.shape)


def view(name: str, expert: int, at_once: bool) -> View:
    return View(name, expert, None, at_once)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, TOKENS, WIDTH, generator=generator) for _ in range(2)]


def group(at_once: bool, experts: range) -> GroupBlock:
    module, given = Toy(at_once), inputs()
    views = [view(name, e, at_once) for e in experts for name in ("up", "down")]
    states = [WeightState(v.name, v, W4, v.get(module), torch.float32, i) for i, v in enumerate(views)]
    block = GroupBlock(module, states, given, [Call((None,), {}, 0, None)] * 2, scale_dtype=torch.float32)
    block.target = block.outputs()
    return block


def rows_of(expert: int) -> Tensor:
    """The rows that an expert gets, in float64."""
    whole = [x.reshape(-1, WIDTH) for x in inputs()]
    return torch.cat([x[torch.arange(len(x)) % 3 == expert] for x in whole]).double()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("experts", [range(COUNT), range(1, 2), range(2, 4)], ids=str)
def test_statistics_are_those_of_the_rows_that_chose_an_expert(at_once: bool, experts: range) -> None:
    block = group(at_once, experts)
    block.observe((Hessian, MeanSquare, Inputs))
    assert block.tokens is not None
    for expert in experts:
        x, up = rows_of(expert), view("up", expert, at_once)
        inner = (x @ up.get(block.module).double().t()).relu()
        for name, rows in ((up.name, x), (view("down", expert, at_once).name, inner)):
            assert block.tokens[name] == len(rows) == (0 if expert == IDLE else 40)
            found = block.weights[name].statistics
            assert found[Hessian].count == found[Inputs].count == len(rows)
            assert torch.allclose(found[Hessian].total.double(), rows.t() @ rows, rtol=1e-4, atol=1e-4)
            if len(rows):
                assert torch.allclose(found[MeanSquare].mean.double(), rows.square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_the_block_keeps_its_weights_and_an_idle_expert_is_rounded(at_once: bool, method: str) -> None:
    block = group(at_once, range(COUNT))
    before = {name: p.clone() for name, p in block.module.named_parameters()}
    pipeline = make(Recipe(methods=(method,), scheme=W4))
    block.observe(pipeline.first)
    steps.quantize(block, pipeline)
    assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())
    for state in block.weights.values():
        assert state.quantized is not None and not torch.equal(state.result(), state.value)
        if state.view.index == IDLE and method == "gptq":
            nearest = round_to_nearest(state.value, W4, torch.float32).dequantize(torch.float32)
            error, least = ((q - state.value).norm() for q in (state.result(), nearest))
            assert error < 1.05 * least


def test_tokens_are_those_of_the_first_pass() -> None:
    """A later pass of a refinement sees the quantized block, whose inner rows may be others."""
    block = group(False, range(COUNT))
    block.observe(())
    first = block.tokens
    block.inputs = block.inputs[:1]
    block.calls = block.calls[:1]
    block.observe((Hessian,))
    assert block.tokens is first and block.weights[view("up", 0, False).name].statistics[Hessian].count == 20
