"""Binary weights: the mean magnitude is the best scale, and what has no 0 keeps zeros as small as it can."""

from __future__ import annotations

import torch

from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.numerics.gptq import solve
from llmq.numerics.hqq import half_quadratic
from llmq.numerics.learned_rounding import LearnedWeight
from llmq.numerics.straight_through import TrainedWeight
from tests.llmq.grids.test_ternary import sample

BINARY = Scheme(2, 8, grid="binary")


def test_the_scale_is_the_mean_magnitude() -> None:
    weight, by = sample(0), torch.rand(32, generator=torch.Generator().manual_seed(1))
    size, wide = weight.abs().view(8, 4, 8), by.view(1, 4, 8)
    for method, want in (("minmax", size.mean(-1)), ("mse", size.mean(-1)), ("weighted", None)):
        want = (size * wide).sum(-1) / wide.sum(-1) if want is None else want
        found, _ = rounding_of(BINARY.rules).find_scale(weight, BINARY, method, by, torch.float32)
        torch.testing.assert_close(found, want)


def test_groups_of_zeros_and_dead_inputs_through_every_solver() -> None:
    """Codes are −1 and 1, and what was 0 is nearly 0, whatever solved or trained it."""
    weight = sample(2)
    weight[:2] = 0
    weight[2, :8] = 0
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    x[:, 5] = 0
    solved = [
        round_to_nearest(weight, BINARY, torch.bfloat16),
        half_quadratic(weight, BINARY, torch.bfloat16, p=3.0, unbiased=0.7),
        *(solve(weight, x.t() @ x, BINARY, act_order=order, sweeps=2) for order in ("none", "static", "grouped")),
    ]
    for q in solved:
        assert isinstance(q, QuantizedWeight)
        for kind in (LearnedWeight, TrainedWeight):
            learned = kind(q, weight)
            first = learned.quantized()
            assert torch.equal(first.codes, q.codes) and torch.equal(first.scale, q.scale)
            learned.step(torch.ones(8, 32), 0.1, 0.01)
            q = learned.quantized()
            assert q.codes.unique().tolist() == [-1, 1] and bool(torch.isfinite(q.scale).all())
            assert float(q.dequantize(torch.float32)[:2].abs().max()) < 1e-37
