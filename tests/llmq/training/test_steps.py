"""The steps of training: the loss against its definition, the order of rows, the rate, the optimizers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llmq.data.instructions import Example
from llmq.inference.pretrained import load_model
from llmq.training.steps import IGNORED, held_out_loss, loss_of, make_optimizer, mode, padded, rate, split, steps_of
from tests.llmq.refusal import refused


def test_the_loss_is_the_answers_alone(tiny_model: Path) -> None:
    """A padded batch against each row alone, by the definition, in float64."""
    model = load_model(tiny_model)
    batch = [
        Example((5, 6, 7, 8), (False, False, True, True), 0),
        Example((9, 10), (False, True), 1),
        Example((1, 2, 3, 4, 5, 6, 7), (False, True, False, True, True, False, False), 2),
    ]
    expected, learned = 0.0, 0
    with torch.no_grad():
        for row in batch:
            scores = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            for i, learn in enumerate(row.learn):
                if learn:
                    expected, learned = expected - float(scores[i - 1, row.ids[i]]), learned + 1
        loss, count = loss_of(model, batch, "cpu")
    assert count == learned
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert int((padded(batch)[1] != IGNORED).sum()) == learned


def test_every_row_once_an_epoch_in_another_order() -> None:
    data = [Example(tuple(range(2 + i % 7)), (True,) * (2 + i % 7), i) for i in range(101)]
    epochs = [[row.row for step in steps_of(data, 4, epoch, 0) for row in step] for epoch in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(101))
    assert epochs[0] != epochs[1] and epochs[0] == epochs[2]
    assert max(map(len, steps_of(data, 4, 0, 0))) == 4


def test_the_rate_rises_and_falls() -> None:
    cosine = [rate(i, 100, 1.0, 0.1, "cosine") for i in range(100)]
    assert cosine[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cosine[55] == pytest.approx(0.5) and cosine[99] < 0.001
    assert rate(55, 100, 1.0, 0.1, "linear") == pytest.approx(0.5) and rate(99, 100, 1.0, 0.1, "constant") == 1.0


def test_without_bitsandbytes_torch_optimizes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    parameters = [nn.Parameter(torch.zeros(4))]
    made, name = make_optimizer("auto", parameters, 0.1, 0.0)
    assert isinstance(made, torch.optim.AdamW) and "pip install bitsandbytes" in name
    refused(lambda: make_optimizer("8bit", parameters, 0.1, 0.0), "--optimizer 8bit")


def test_the_rate_falls_as_torch_s_schedulers_fall() -> None:
    """The falling part against torch's own schedulers, step for step."""
    total, rise = 40, 8
    parameter = nn.Parameter(torch.zeros(1))
    for name, make in (
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total - rise)),
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total - rise)),
    ):
        optimizer = torch.optim.SGD([parameter], lr=0.3)
        schedule = make(optimizer)
        for step in range(rise, total):
            assert rate(step, total, 0.3, rise / total, name) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()


def test_a_run_of_one_step_has_its_peak_rate_or_falls_from_it() -> None:
    assert rate(0, 1, 0.5, 0.0, "cosine") == rate(0, 1, 0.5, 0.9, "linear") == 0.5


def test_padding_is_at_the_right_and_never_learned() -> None:
    ids, targets = padded([Example((7, 8), (False, True), 0), Example((1, 2, 3, 4), (True,) * 4, 1)])
    assert ids.tolist() == [[7, 8, 0, 0], [1, 2, 3, 4]]
    assert targets.tolist() == [[IGNORED, 8, IGNORED, IGNORED], [1, 2, 3, 4]]


def test_rows_of_a_step_are_of_like_length() -> None:
    """Sorted within sixteen steps: a step's rows are neighbours in length there."""
    data = [Example((0,) * (1 + i % 32), (True,) * (1 + i % 32), i) for i in range(64)]
    spread = [max(len(r.ids) for r in step) - min(len(r.ids) for r in step) for step in steps_of(data, 4, 0, 0)]
    assert max(spread) <= 1


def test_another_seed_is_another_order() -> None:
    data = [Example((0, 1), (True, True), i) for i in range(50)]
    orders = [[row.row for step in steps_of(data, 5, 0, seed) for row in step] for seed in (0, 1)]
    assert orders[0] != orders[1]


class Tiny(nn.Module):
    """Scores of the next token by the token before alone; dropout shows in which mode it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dropout = nn.Embedding(12, 12), nn.Dropout(0.5)
        self.seen: list[bool] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        from types import SimpleNamespace

        self.seen.append(self.training)
        return SimpleNamespace(logits=self.dropout(self.table(input_ids)))


def test_the_held_out_loss_is_the_mean_over_all_tokens_without_dropout() -> None:
    """Whatever the batch is: rows of many tokens count for more than rows of few."""
    torch.manual_seed(0)
    model = Tiny().train()
    rows = [Example(tuple(range(1, n)), (False, *(True,) * (n - 2)), n) for n in (3, 9, 5, 12, 4)]
    scores = model.table.weight.detach().double().log_softmax(-1)
    pairs = [(a, b) for row in rows for a, b in zip(row.ids, row.ids[1:], strict=False)]
    expected = -sum(float(scores[a, b]) for a, b in pairs) / len(pairs)
    for batch in (1, 2, 5):
        assert held_out_loss(model, rows, batch, "cpu") == pytest.approx(expected, rel=1e-5)
    assert not any(model.seen) and model.training and model.dropout.training


def test_no_held_out_rows_lose_nothing() -> None:
    assert held_out_loss(Tiny(), [], 4, "cpu") == 0.0


def test_4_bit_modules_stay_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[0].quant_state = None
    mode(model, False)
    assert (model.training, model[0].training, model[1].training) == (False, True, False)
    mode(model, True)
    assert model[1].training


def test_the_last_part_of_a_split_is_what_is_left() -> None:
    rows = [Example((i,), (True,), i) for i in range(7)]
    assert [[row.row for row in part] for part in split(rows, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_torch_s_optimizer_is_given_the_rate_and_the_decay() -> None:
    """One step from 1 with gradient 1: AdamW shrinks by lr · decay, then goes lr against the gradient."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float64))
    made, name = make_optimizer("torch", [parameter], 0.1, 0.5)
    parameter.grad = torch.ones(4, dtype=torch.float64)
    made.step()
    assert name == "torch AdamW"
    assert torch.allclose(parameter.detach(), torch.full((4,), 1 - 0.1 * 0.5 - 0.1, dtype=torch.float64), atol=1e-6)
