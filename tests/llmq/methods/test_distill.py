"""The steps of distillation on a student with a loss that is known: rates, epochs, what is held out, when it ends."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.grids.scheme import Scheme
from llmq.methods.distill import HELD_OUT, Distill, read_bytes


class Parabola:
    """A student whose loss is its parameters' squared distance from a batch's own centre."""

    windows = 2

    def __init__(self, batches: int = 9, spread: float = 0.0) -> None:
        self.batches = batches
        chance = torch.Generator().manual_seed(0)
        self.centres = 1 + spread * torch.randn(batches, 4, generator=chance)
        self.parameters = {"a": nn.Parameter(torch.ones(2) * 1.1), "b": nn.Parameter(torch.zeros(2))}
        self.kept: tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None = None
        self.taken: list[Sequence[int]] = []
        self.told: list[str] = []
        self.saves = 0

    def _loss(self, batches: Sequence[int]) -> Tensor:
        values = torch.cat([*self.parameters.values()])
        return torch.stack([(values - self.centres[b]).square().sum() for b in batches]).mean()

    def loss(self, batches: Sequence[int]) -> float:
        return float(self._loss(batches))

    def descend(self, batches: Sequence[int], step: Callable[[], object]) -> float:
        loss = self._loss(batches)
        found = torch.autograd.grad(loss, [*self.parameters.values()])
        for parameter, gradient in zip(self.parameters.values(), found, strict=True):
            parameter.grad = gradient
            step()
            assert parameter.grad is None
        self.taken.append(batches)
        return float(loss)

    def save(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> None:
        copied = {name: value.detach().clone() for name, value in values.items()}
        self.kept = copied, copy.deepcopy(optimizer.state_dict()), dict(about)
        self.saves += 1

    def load(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        if self.kept is None:
            return None
        for name, value in values.items():
            value.data.copy_(self.kept[0][name])
        optimizer.load_state_dict(copy.deepcopy(self.kept[1]))
        return dict(self.kept[2])

    def progress(self, text: str) -> None:
        self.told.append(text)


def test_it_goes_down_to_the_best_step() -> None:
    student = Parabola()
    done = Distill(steps=45, learning_rate=0.1).tune(student)
    assert done.before == pytest.approx(2.02) and done.after < 0.05 and done.steps == len(student.told) == 45
    held, _ = Distill().split(student.batches)
    assert student.loss(held) == pytest.approx(done.after)
    assert not {b for taken in student.taken for b in taken} & {*held}
    # At the start, every ten steps and at the end.
    assert student.saves == 6


@pytest.mark.parametrize("after", [1, 9, 10, 11, 25, 30])
def test_killed_after_any_step_it_goes_on_to_the_same_values(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be killed again at once: what was not saved is done again."""
    method = Distill(steps=30, learning_rate=0.05)
    whole, broken = Parabola(spread=0.3), Parabola(spread=0.3)
    wanted = method.tune(whole)

    def kill(text: str) -> None:
        broken.told.append(text)
        if len(broken.told) == after:
            raise KeyboardInterrupt

    for _ in range(2):
        broken.told.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(broken, "progress", kill)
            method.tune(broken)
    assert method.tune(broken) == wanted
    assert all(torch.equal(whole.parameters[name], value) for name, value in broken.parameters.items())


def test_it_ends_where_nothing_gets_better_and_takes_the_start_if_all_is_worse() -> None:
    student = Parabola(spread=0.3)
    method = Distill(steps=500, learning_rate=0.9)
    held, _ = method.split(9)
    with torch.no_grad():
        best = student.centres[held].mean(0)
        student.parameters["a"].copy_(best[:2])
        student.parameters["b"].copy_(best[2:])
    done = method.tune(student)
    assert done.at == 0 and done.after == done.before and done.steps == 30
    assert torch.equal(torch.cat([*student.parameters.values()]), best)


def test_where_the_rate_is_too_large_it_goes_on_from_the_best_more_slowly() -> None:
    student = Parabola()
    method = Distill(steps=40, learning_rate=0.9)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.fill_(1.02)
    done = method.tune(student)
    assert done.at >= 20 and done.after < 0.5 * done.before
    assert student.kept is not None and student.kept[2]["share"] < 1


def test_a_run_that_an_earlier_version_began_goes_on() -> None:
    student = Parabola()
    method = Distill(steps=20, learning_rate=0.05)
    wanted = method.tune(student)
    again = Parabola()
    Distill(steps=1, learning_rate=0.05).tune(again)
    assert again.kept is not None and again.kept[2].pop("share") == 1
    assert method.tune(again).steps == wanted.steps


def test_a_loss_that_is_no_number_is_never_better() -> None:
    student = Parabola()
    student.centres[1:] = float("nan")
    student.centres[Distill().split(9)[0]] = 1.0
    done = Distill(steps=20).tune(student)
    assert done.at == 0 and torch.equal(student.parameters["b"], torch.zeros(2))


@pytest.mark.parametrize("batches", [2, 8, 9, 128])
def test_one_batch_in_eight_is_held_out(batches: int) -> None:
    held, train = Distill(seed=3).split(batches)
    assert len(held) == -(-batches // HELD_OUT) and sorted(held + train) == [*range(batches)]


def test_every_batch_is_taken_once_an_epoch_in_another_order() -> None:
    method, train = Distill(seed=1), [3, 5, 8, 9, 11]
    taken = [method.taken(train, step, 2) for step in range(10)]
    flat = [b for batches in taken for b in batches]
    epochs = [flat[i : i + 5] for i in range(0, 20, 5)]
    assert all(Counter(epoch) == Counter(train) for epoch in epochs) and len({*map(tuple, epochs)}) > 1
    assert taken == [method.taken(train, step, 2) for step in range(10)]
    assert Counter(method.taken(train, 0, 64)) == Counter(train)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    method = Distill(steps=40, learning_rate=2.0**-8)
    rates = [method.rate(step) for step in range(40)]
    assert rates[:10] == [2.0**-8 * (step + 1) / 10 for step in range(10)]
    assert rates[9] == rates[10] == 2.0**-8 and rates[39] == pytest.approx(2.0**-8 / 30)
    assert Distill(steps=1).rate(0) > 0


def test_blocks_are_a_byte_for_each_code() -> None:
    block = SimpleNamespace(module=nn.Linear(8, 4), weights={"weight": None})
    assert read_bytes([block, block], torch.bfloat16) == 2 * (32 + 4 * 2)


def test_scales_that_are_codes_cannot_move() -> None:
    double = Scheme(4, 64, grid="nf4", double_quant=True)
    assert "cannot move" in str(Distill().refusal(double)) and str(double) in str(Distill().refusal(double))
    assert Distill().refusal(Scheme(4, 64, grid="nf4")) is None
