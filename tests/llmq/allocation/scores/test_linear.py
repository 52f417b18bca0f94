"""One divergence per group; and losses that follow the squared error of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.allocation.scores import linear
from llmq.allocation.scores._linear import extended, ratio, squared_error, unmeasured
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from tests.llmq.allocation.tasks import CANDIDATES, Whole, task


def test_the_smallest_is_measured_and_the_others_follow_their_errors(tiny_model: Path) -> None:
    of = task(tiny_model)
    whole = Whole(tiny_model, of)
    losses = linear.losses(of)
    for g in (0, 7):
        assert losses[g][0] == pytest.approx(whole.rounded({g: 0}), rel=2e-3)
        parts = [whole.part(of.groups[g], weight) for weight in of.groups[g].weights]
        errors = [sum(float(squared_error(part, s, of.scale_dtype)[0]) for part in parts) for s in CANDIDATES[:4]]
        assert losses[g][:4] == pytest.approx([losses[g][0] * e / errors[0] for e in errors], rel=1e-4)
        assert losses[g][4] == 0


def test_errors_are_needed_of_what_is_not_measured_and_of_one_that_is(tiny_model: Path) -> None:
    of = task(tiny_model)
    assert unmeasured(of, {(0, 0): 1.0, (0, 1): 0.5})[:3] == [(0, 1), (0, 2), (0, 3)]
    every = {(g, c): 1.0 for g in range(len(of.groups)) for c in range(4)}
    assert unmeasured(of, every) == []
    errors = {(g, c): 4.0**-c for g, c in unmeasured(of, {(g, 0): 2.0 for g in range(len(of.groups))})}
    assert extended(of, {(g, 0): 2.0 for g in range(len(of.groups))}, errors)[3] == [2.0, 0.5, 0.125, 0.03125, 0.0]
    assert extended(of, {}, {})[0] == [0.0] * 5
    assert extended(of, {(0, 0): -1e-9}, {(0, c): 1.0 for c in range(4)})[0] == [0.0] * 5


def test_squared_errors() -> None:
    weight = torch.randn(8, 32)
    apart, whole = squared_error(weight, Scheme(3, 16), torch.float32).tolist()
    rounded = round_to_nearest(weight, Scheme(3, 16), torch.float32).dequantize(torch.float32)
    assert apart == pytest.approx(float((rounded - weight).double().square().sum()))
    assert whole == pytest.approx(float(weight.double().square().sum()))
    assert squared_error(weight, None, torch.float32).tolist() == [0.0, whole]
    assert ratio(0.0, 0.0) == 0.0 and ratio(1.0, 4.0) == 0.25
