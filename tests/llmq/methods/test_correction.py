"""The corrections of a block's weights, against sums that are computed here from all inputs at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.block.block import Block, WeightState
from llmq.block.chains import Chains, stages
from llmq.block.statistics import Hessian, MeanSquare
from llmq.discovery.calls import Call
from llmq.discovery.view import View
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Activations, Scheme
from llmq.methods import _correction as correction
from llmq.methods._correction import correct

WIDTH, INNER = 8, 12


class Layer(nn.Module):
    """Two sublayers, each added to the residual stream; the one that is used last is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(INNER, WIDTH, bias=False), nn.Linear(WIDTH, INNER)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.tanh())
        return x + self.down(self.up(x).relu())


def opened(windows: int = 16, tokens: int = 10, apart: float = 0.1, **scheme: Any) -> Block:
    torch.manual_seed(1)
    layer = Layer().requires_grad_(False)
    states = []
    for i, name in enumerate(["down", "up", "mix"]):
        value, view = layer.get_submodule(name).weight.data, View(f"{name}.weight")
        states.append(WeightState(name, view, replace(Scheme(3, None), **scheme), value, torch.float32, i))
    sizes = [2] * (windows // 2) + [1] * (windows % 2)
    exact = [torch.randn(size, tokens, WIDTH) for size in sizes]
    inputs = [one + apart * torch.randn_like(one) for one in exact]
    calls = [Call((None,), {}, 0, None)] * len(inputs)
    return Block(layer, states, inputs, calls, unquantized=(exact, calls))


def quantize(block: Block, parameter: str) -> None:
    state = block.weights[parameter]
    block.set_quantized(parameter, round_to_nearest(state.value, state.scheme, torch.float32))


def rows(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(0, 1) for part in parts]).double()


def test_weights_are_taken_in_the_order_of_their_use() -> None:
    assert [[state.name for state in stage] for stage in stages(opened())] == [["mix"], ["up"], ["down"]]


def test_full_correction_of_the_last_weight() -> None:
    block = opened()
    chains = Chains(block)
    first, second, last = stages(block)
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    for stage in (first, second):
        quantize(block, stage[0].parameter)
        chains.round(stage)
    (found,), statistics = correct(block, last, chains, (MeanSquare,), "full")
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, before[name])
    layer = block.module.double()
    assert block.unquantized is not None
    x = rows(block.unquantized[0])
    exact = x + layer.mix(x.tanh())
    exact_inner = layer.up(exact).relu()
    for state in (first[0], second[0]):
        state.view.set(layer, state.result().double())
    x = rows(block.inputs)
    now = x + layer.mix(x.tanh())
    inner = layer.up(now).relu()
    hessian, weight = inner.t() @ inner, last[0].value.double()
    damped = hessian + correction.DAMPING * hessian.diagonal().mean() * torch.eye(INNER, dtype=torch.float64)
    moment = weight @ (exact_inner - inner).t() @ inner + (exact - now).t() @ inner
    torch.testing.assert_close(found.value.double(), weight + moment @ torch.linalg.inv(damped), rtol=1e-3, atol=1e-4)
    assert found.strengths == (1.0, 1.0)
    torch.testing.assert_close(statistics[Hessian].total.double(), hessian, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics[MeanSquare].mean.double(), inner.square().mean(0), rtol=1e-4, atol=1e-5)


def test_strengths_come_from_tokens_that_are_added_to_the_sums_afterwards() -> None:
    block = opened()
    chains = Chains(block)
    stage = stages(block)[0]
    (held,), statistics = correct(block, stage, chains, (Hessian,), "held-out")
    (full,), whole = correct(block, stage, chains, (Hessian,), "full")
    torch.testing.assert_close(statistics[Hessian].total, whole[Hessian].total, rtol=1e-5, atol=1e-4)
    by_input, by_stream = held.strengths
    assert 0 < by_input <= 1 and by_stream is not None and 0 < by_stream <= 1
    assert not torch.equal(held.value, stage[0].value) and not torch.equal(full.value, stage[0].value)


def test_rows_of_a_weight_are_corrected_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.grids.base.ROWS", 2)
    block = opened()
    chains, stage = Chains(block), stages(block)[0]
    (whole,), _ = correct(block, stage, chains, (Hessian,), "held-out")
    (rows,), _ = correct(block, stage, chains, (Hessian,), "held-out", [slice(2, len(stage[0].value))])
    assert torch.equal(rows.value, whole.value[2:]) and rows.strengths == whole.strengths
    assert correct(block, stage, chains, (Hessian,), "held-out", [None])[0] == [None]


def test_noise_is_not_followed() -> None:
    # Inputs that are apart at random tell nothing about those of other windows: nearly all of the fit is noise.
    block = opened(windows=16, tokens=2, apart=0.0)
    torch.manual_seed(0)
    assert block.unquantized is not None
    exact = [h.clone() for h in block.unquantized[0]]
    for hidden in exact:
        hidden[..., 0] += torch.randn_like(hidden[..., 0])
    block.unquantized = exact, block.unquantized[1]
    (held,), _ = correct(block, stages(block)[0], Chains(block), (Hessian,), "held-out")
    assert held.strengths[0] <= 0.5


def test_equal_chains_need_no_correction() -> None:
    block = opened(apart=0.0)
    (found,), _ = correct(block, stages(block)[0], Chains(block), (Hessian,), "held-out")
    assert torch.equal(found.value, stages(block)[0][0].value)
    # The stream is known, though both chains have the same.
    assert found.strengths == (0.0, 0.0)


def test_what_only_the_tokens_kept_back_show_is_not_corrected() -> None:
    block = opened(apart=0.0)
    assert block.unquantized is not None
    exact = [h.clone() for h in block.unquantized[0]]
    # The eighth window: the second one of the fourth batch.
    exact[3][1] += 1
    block.unquantized = exact, block.unquantized[1]
    (found,), _ = correct(block, stages(block)[0], Chains(block), (Hessian,), "held-out")
    assert torch.equal(found.value, stages(block)[0][0].value) and found.strengths == (0.0, 0.0)


def test_one_window_cannot_choose() -> None:
    block = opened(windows=1)
    (found,), _ = correct(block, stages(block)[0], Chains(block), (Hessian,), "held-out")
    assert found.strengths == (0.5, 0.5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_inputs_are_compared_as_they_are_multiplied(dynamic: bool) -> None:
    block = opened(apart=0.0, bits=8, activations=Activations(dynamic=dynamic))
    block.calibrate_inputs()
    chains = Chains(block)
    stage = stages(block)[0]
    (found,), _ = correct(block, stage, chains, (Hessian,), "full")
    # The chains' hidden states are the same: only the rounding of the input is apart.
    assert not torch.equal(found.value, stage[0].value)
    torch.testing.assert_close(found.value, stage[0].value, rtol=0.05, atol=0.02)
