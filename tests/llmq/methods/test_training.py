"""The steps that learning block by block consists of: which batches, at which rates, which iterate is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.block.block import Block, WeightState
from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight
from llmq.grids.scheme import Scheme
from llmq.methods._training import LOOKS, Training, check_steps
from tests.llmq.methods.test_signround import block_of, codes


class Scripted:
    """Learns nothing: every step moves the codes by one column."""

    def __init__(self, q: QuantizedWeight, state: WeightState) -> None:
        self.q = q
        self.rates: list[tuple[float, float]] = []
        self.codes = q.codes.clone()

    def value(self, out: Tensor) -> None:
        out.copy_(self.quantized().dequantize(out.dtype))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        assert gradient.shape == self.codes.shape
        self.rates.append((rate, scale_rate))
        self.codes = torch.roll(self.codes, 1, 1)

    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.q.scale, self.q.zero, self.q.scheme)


def training(block: Block, iterations: int = 24, minibatch: int = 2) -> Training:
    return Training(block, Scripted, iterations=iterations, minibatch=minibatch, reach=0.5, scale_reach=0.2, seed=1)


def test_rates_fall_linearly_and_sum_to_the_reach() -> None:
    made = training(block_of(Scheme(3, 8)))
    made.run()
    for _, learned in made.learned:
        assert isinstance(learned, Scripted)
        rates = [rate for rate, _ in learned.rates]
        assert len(rates) == 24 and sum(rates) == pytest.approx(0.5)
        assert sum(rate for _, rate in learned.rates) == pytest.approx(0.2)
        assert [a - b for a, b in zip(rates, rates[1:], strict=False)] == pytest.approx([rates[-1]] * 23)


def test_every_eighth_batch_is_held_out_and_the_others_are_used_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    made = training(block_of(Scheme(3, 8), batches=9), iterations=14)
    assert len(made.held) == 2 and sorted([*made.held, *made.train]) == list(range(9))
    seen: list[int] = []
    real = Training.add_gradients

    def noticed(self: Training, batches: list[int]) -> None:
        seen.extend(batches)
        real(self, batches)

    monkeypatch.setattr(Training, "add_gradients", noticed)
    made.run()
    assert len(seen) == 28 and [seen.count(i) for i in made.train] == [4] * 7


def test_the_best_of_the_iterates_that_are_compared_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(Scheme(3, 8))
    start, made = codes(block), training(block)
    losses = iter([5.0, 4.0, 1.0, 2.0, *[3.0] * 20])
    seen: list[list[Tensor]] = []

    def held_out(self: Training) -> float:
        seen.append([q.codes.clone() for q in self.found()])
        return next(losses)

    monkeypatch.setattr(Training, "_held_out", held_out)
    made.run()
    assert len(seen) == 1 + LOOKS and all(torch.equal(a, b) for a, b in zip(seen[0], start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[2], codes(block), strict=True))
    assert not torch.equal(seen[2][0], start[0])


def test_where_no_iterate_is_better_the_start_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(Scheme(3, 8))
    start = [state.quantized for state in block.weights.values()]
    monkeypatch.setattr(Training, "_held_out", lambda self: 1.0)
    training(block).run()
    assert all(a is state.quantized for a, state in zip(start, block.weights.values(), strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [((0, 1, 0.5, 0.5, "logits"), "iterations"), ((1, 1, 9.0, 0.5, "output"), "reach"), ((1, 1, 0.5, 0.5, ""), "last")],
)
def test_options_are_checked(options: tuple[int, int, float, float, str], told: str) -> None:
    with pytest.raises(LlmqError, match=told):
        check_steps(*options)
