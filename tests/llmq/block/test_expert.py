"""An expert as a block: its statistics against float64, with few tokens, none, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.block.block import WeightState
from llmq.block.expert import CHUNK_ROWS, PRIOR_TOKENS, ExpertBlock
from llmq.block.statistics import Hessian, Inputs, MeanSquare, Statistic
from llmq.discovery.view import View
from llmq.grids.scheme import Scheme

CPU = torch.device("cpu")
WIDTH, INNER = 16, 24
W4 = Scheme(4, 8)


class Toy(nn.Module):
    """The two halves of one parameter are gate and up; down takes their product."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.gate_up = nn.Parameter(torch.randn(2 * INNER, WIDTH, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(WIDTH, INNER, generator=generator) / 5)

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = nn.functional.linear(rows, self.gate_up).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down)

    def inner(self, rows: Tensor) -> Tensor:
        """What down takes, in float64."""
        gate, up = (rows.double() @ self.gate_up.double().t()).chunk(2, -1)
        return gate * torch.sigmoid(gate) * up


GATE, UP, DOWN = View("gate_up", rows=(0, INNER)), View("gate_up", rows=(INNER, 2 * INNER)), View("down")


def drawn(rows: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def block(
    own: Tensor, weights: Tensor, others: Tensor, entering: Tensor, everyone: Sequence[Tensor] = ()
) -> ExpertBlock:
    """An expert whose module is entered by the rows `entering`."""
    module = Toy()
    states = [
        WeightState(view.name, view, W4, view.get(module), torch.float32, input_id)
        for view, input_id in ((GATE, 7), (UP, 7), (DOWN, 8))
    ]
    of_all: dict[type[Statistic], Statistic] = {}
    for kind in (Hessian, MeanSquare, Inputs):
        of_all[kind] = kind(WIDTH, CPU)
        of_all[kind].update(entering)
    return ExpertBlock(
        module, states, own, weights, others, of_all, {7}, everyone=everyone, scale_dtype=torch.float32, device=CPU
    )


def mean_product(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """E[w² x xᵀ] in float64, w scaled to a mean square of 1."""
    if weights is None:
        weights = torch.ones(len(x))
    squares = weights.double().square()
    return torch.einsum("n,ni,nj->ij", squares / squares.mean(), x.double(), x.double()) / len(x)


def close(found: Tensor, want: Tensor) -> bool:
    return bool((found.double() - want).norm() / want.norm() < 1e-5)


@pytest.mark.parametrize("rows", [1, 5, 32, 300, CHUNK_ROWS + 77])
def test_hessians_are_drawn_towards_those_of_other_tokens(rows: int) -> None:
    own, others, entering = drawn(rows, 0, 0.7), drawn(128, 1), drawn(900, 2, 1.3)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(4)) + 0.01
    expert = block(own, weights, others, entering)
    outputs = expert.observe((Hessian, MeanSquare))
    module: Any = expert.module
    assert torch.allclose(torch.cat(outputs), module(own))
    alpha = rows / (rows + PRIOR_TOKENS)
    assert expert.tokens == rows and expert.alpha == pytest.approx(alpha)
    outer = alpha * mean_product(own, weights) + (1 - alpha) * mean_product(entering)
    inner = alpha * mean_product(module.inner(own), weights) + (1 - alpha) * mean_product(module.inner(others))
    for view, want in ((GATE, outer), (UP, outer), (DOWN, inner)):
        found = expert.weights[view.name].statistics
        assert close(found[Hessian].total / rows, want) and close(found[MeanSquare].mean, want.diagonal())
        assert found[Hessian].count == found[MeanSquare].count == rows
    # Of one input, there is one.
    assert expert.weights[GATE.name].statistics[Hessian] is expert.weights[UP.name].statistics[Hessian]


def test_without_tokens_of_its_own_others_are_all_there_is() -> None:
    others, entering = drawn(100, 1), drawn(900, 2, 1.3)
    expert = block(drawn(0, 0), torch.empty(0), others, entering)
    outputs = expert.observe((Hessian,))
    module: Any = expert.module
    assert (expert.tokens, expert.alpha) == (0, 0) and torch.allclose(torch.cat(outputs), module(others))
    for view, want in ((GATE, mean_product(entering)), (DOWN, mean_product(module.inner(others)))):
        found = expert.weights[view.name].statistics[Hessian]
        assert close(found.total / found.count, want)


def test_with_no_other_tokens_its_own_are_all_there_is() -> None:
    own, weights = drawn(60, 0), torch.linspace(0.1, 1, 60)
    expert = block(own, weights, drawn(0, 1), own)
    expert.observe((Hessian,))
    module: Any = expert.module
    for view, want in ((GATE, mean_product(own, weights)), (DOWN, mean_product(module.inner(own), weights))):
        assert close(expert.weights[view.name].statistics[Hessian].total / 60, want)


@pytest.mark.parametrize("own", [0, 7, 500])
def test_of_everyone_the_statistics_are_those_of_all_rows_whoever_chose_it(own: int) -> None:
    entering = drawn(900, 2, 1.3)
    others = entering[own : own + 128]
    weights = torch.rand(own, generator=torch.Generator().manual_seed(4))
    expert = block(entering[:own], weights, others, drawn(50, 9), entering.split(400))
    outputs = expert.observe((Hessian, MeanSquare, Inputs))
    module: Any = expert.module
    assert (expert.tokens, expert.alpha) == (own, 0)
    assert [len(part) for part in outputs] == [400, 400, 100] and torch.allclose(torch.cat(outputs), module(entering))
    for view, rows in ((GATE, entering), (UP, entering), (DOWN, module.inner(entering))):
        found = expert.weights[view.name].statistics
        assert found[Hessian].count == 900 and close(found[Hessian].total / 900, mean_product(rows))
        assert close(found[MeanSquare].mean, rows.double().square().mean(0))
        assert torch.allclose(found[Inputs].low.double(), rows.double().amin(0), atol=1e-5)


def test_weights_count_relative_to_each_other() -> None:
    """Twice all weights changes nothing, and a weight of 0 is a row that is not there but for its count."""
    own, others, entering = drawn(40, 0), drawn(128, 1), drawn(900, 2)
    weights = torch.rand(40)
    found = []
    for given in (weights, 2 * weights, weights.to(torch.bfloat16), torch.cat([torch.zeros(10), weights[10:]])):
        expert = block(own, given, others, entering)
        expert.observe((Hessian,))
        found.append(expert.weights[DOWN.name].statistics[Hessian].total.clone())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(found[0], found[2], rtol=0.05, atol=0.1)
    assert not torch.allclose(found[0], found[3], rtol=0.05, atol=0.1)
    alpha = 40 / 72
    module: Any = expert.module
    fewer = alpha * mean_product(module.inner(own[10:]), weights[10:])
    assert close(found[3] / 40, fewer + (1 - alpha) * mean_product(module.inner(others)))


def test_weights_that_are_all_zero_leave_what_others_say() -> None:
    own, others, entering = drawn(40, 0), drawn(128, 1), drawn(900, 2)
    expert = block(own, torch.zeros(40), others, entering)
    expert.observe((Hessian,))
    for view in (GATE, DOWN):
        total = expert.weights[view.name].statistics[Hessian].total
        assert bool(total.isfinite().all()) and float(total.diagonal().min()) > 0


def test_magnitudes_are_not_weighted() -> None:
    """A scale is found for what the input may be, whatever its row counts."""
    own, others, entering = drawn(40, 0), drawn(128, 1, 0.5), drawn(900, 2, 0.5)
    expert = block(own, torch.rand(40), others, entering)
    expert.observe((Inputs,))
    found, alpha = expert.weights[GATE.name].statistics[Inputs], 40 / 72
    assert torch.allclose(found.mean_abs, alpha * own.abs().mean(0) + (1 - alpha) * entering.abs().mean(0), rtol=1e-4)
    assert torch.equal(found.low, torch.minimum(own.amin(0), entering.amin(0)))
    assert torch.equal(found.high, torch.maximum(own.amax(0), entering.amax(0)))


def test_statistics_of_all_rows_are_left_as_they_are_and_a_second_look_gives_the_same() -> None:
    expert = block(drawn(20, 0), torch.rand(20), drawn(128, 1), drawn(900, 2))
    before = {
        kind: {n: v.clone() for n, v in vars(s).items() if isinstance(v, Tensor)} for kind, s in expert.entering.items()
    }
    totals = []
    for _ in range(2):
        expert.observe((Hessian, Inputs))
        totals.append({name: state.statistics[Hessian].total.clone() for name, state in expert.weights.items()})
    assert all(torch.equal(totals[0][name], totals[1][name]) for name in totals[0])
    for kind, values in before.items():
        assert all(torch.equal(getattr(expert.entering[kind], name), value) for name, value in values.items())


def test_a_statistic_that_knows_nothing_of_experts_is_of_the_rows_that_chose_it() -> None:
    class Count:
        """Rows and their sum."""

        def __init__(self, width: int, device: torch.device) -> None:
            self.count, self.total = 0, torch.zeros(width)

        def update(self, x: Tensor) -> None:
            self.count += len(x)
            self.total += x.sum(0)

        def merge(self, other: Any) -> None:
            raise AssertionError

        @classmethod
        def nbytes(cls, width: int) -> int:
            return 4 * width

    own = drawn(CHUNK_ROWS + 9, 0)
    expert = block(own, torch.rand(len(own)), drawn(128, 1), drawn(900, 2))
    expert.observe((Count, Hessian))
    found = expert.weights[UP.name].statistics[Count]
    assert found.count == len(own) and torch.allclose(found.total, own.sum(0), atol=1e-2)
