"""Outlier Suppression: gains that leave a norm, and tokens clipped where a search in float64 clips them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.block.attempt import Outcome
from llmq.block.statistics import Inputs
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.outlier_suppression import COARSE, FINE, OutlierSuppression, clip_tokens
from tests.llmq.methods.made import block_of, check_function_is_kept

DYNAMIC = Scheme(8, None, activations=Activations())
STATIC = Scheme(8, None, activations=Activations(dynamic=False))


def test_a_norm_is_left_with_the_median_of_its_gain_in_every_channel() -> None:
    block = block_of(DYNAMIC)
    median = block.get("norm.weight").abs().median()
    before = block.error()
    OutlierSuppression().transform(block)
    assert block.log[0].method == "outlier suppression" and block.log[0].outcome is Outcome.KEPT
    assert torch.allclose(block.get("norm.weight"), median.expand(12), rtol=1e-5)
    assert block.error() < before
    check_function_is_kept(block)


def test_a_channel_that_a_norm_sets_to_0_stays_as_it_is() -> None:
    block = block_of(DYNAMIC)
    gain = block.get("norm.weight").clone()
    gain[3] = 0
    block.set("norm.weight", gain)
    block.target = block.outputs()
    block.observe((Inputs,))
    weight = block.get("gate.weight").clone()
    OutlierSuppression().transform(block)
    assert block.log[0].outcome is Outcome.KEPT
    assert float(block.get("norm.weight")[3]) == 0
    assert torch.equal(block.get("gate.weight")[:, 3], weight[:, 3])


def test_a_pair_that_feeds_nothing_quantized_is_passed_over() -> None:
    block = block_of(DYNAMIC, kept=("down.weight",))
    OutlierSuppression().transform(block)
    assert [line.where for line in block.log] == [block.pairs[0].describe()]


def test_only_static_inputs_get_a_scale_one_for_all_that_share_an_input() -> None:
    dynamic, static = block_of(DYNAMIC), block_of(STATIC)
    for block in (dynamic, static):
        OutlierSuppression().transform(block)
    assert [state.input_scale for state in dynamic.weights.values()] == [None] * 3
    gate, up, down = (state.input_scale for state in static.weights.values())
    assert gate is not None and down is not None and gate.shape == (1,) and gate.dtype == torch.float32
    assert gate is up and not torch.equal(gate, down)
    # They are of the inputs as they are after gains have moved.
    assert static.log[0].outcome is Outcome.KEPT
    static.observe((Inputs,))
    rows = static.weights["gate.weight"].statistics[Inputs].rows
    assert float(gate) <= float(rows.abs().max()) / 127.5 * max(FINE) * 1.001


def searched(rows: Tensor, weights: list[Tensor], rounded: list[Tensor]) -> float:
    """The paper's token-wise clipping: quantiles of the tokens' largest magnitudes, then steps around the best."""

    def cost(clip: float) -> float:
        scale = clip / 127.5
        x = (rows / scale).round().clamp(-128, 127) * scale
        return sum(
            float((x @ near.t() - rows @ exact.t()).square().sum())
            for near, exact in zip(rounded, weights, strict=True)
        )

    tokens = rows.abs().amax(1)
    tried = [float(tokens.max()), *(float(torch.quantile(tokens, share)) for share in COARSE)]
    best = min(tried, key=cost)
    return min([best, *(best * factor for factor in FINE)], key=cost) / 127.5


@pytest.mark.parametrize("outlier", [1.0, 5.0, 60.0])
def test_tokens_are_clipped_where_the_outputs_err_least(outlier: float) -> None:
    block = block_of(STATIC)
    alike = [block.weights["gate.weight"], block.weights["up.weight"]]
    rows = torch.randn(96, 12, generator=torch.Generator().manual_seed(4))
    rows[7, 2] = 4 * outlier
    alike[0].statistics[Inputs].rows = rows
    scale = clip_tokens(alike, torch.float32)
    exact = [state.value.double() for state in alike]
    near = []
    for state in alike:
        assert state.rounded is not None
        near.append(state.rounded.double())
    assert float(scale) == pytest.approx(searched(rows.double(), exact, near), rel=1e-5)
