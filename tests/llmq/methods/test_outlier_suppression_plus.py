"""Outlier Suppression+: equations 2 and 8 by hand, and a block whose channels lie to one side."""

from __future__ import annotations

import pytest

from llmq.block.attempt import Outcome
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.outlier_suppression_plus import OutlierSuppressionPlus
from tests.llmq.methods.made import block_of, check_function_is_kept, facts, near, row
from tests.llmq.refusal import refused

W8A8 = Scheme(8, None, activations=Activations())


def test_outlier_suppression_plus_equations_2_and_8() -> None:
    """z = (max + min)/2 = (−0.5, −16, 8); s = max(1, range/2 / t), range/2 = (1.5, 48, 8) and t between 8 and 48."""
    found = list(OutlierSuppressionPlus(thresholds=2)._candidates(facts(), True))
    assert len(found) == 6
    for candidate in found[3:]:
        assert candidate.shift is not None and near(candidate.shift, -0.5, -16, 8)
    scales = [candidate.scale for candidate in found[3:]]
    assert near(scales[0], 1, 1, 1)  # t = 48
    assert near(scales[1], 1, 48 / (48 * 8) ** 0.5, 1)  # halfway, in ratios
    assert near(scales[2], 1, 6, 1)  # t = 8
    # Unshifted: max|x| = (2, 64, 16), t from 64 down to the median 16.
    assert all(candidate.shift is None for candidate in found[:3])
    assert near(found[2].scale, 1, 4, 1)
    assert [c.shift for c in OutlierSuppressionPlus(thresholds=2)._candidates(facts(), False)] == [None] * 3
    refused(lambda: OutlierSuppressionPlus(thresholds=0), "thresholds must be 1 or more")


def test_channels_that_are_always_0_are_left_as_they_are() -> None:
    nothing = row(0, 0, 0)
    for candidate in OutlierSuppressionPlus()._candidates(facts(low=nothing, high=nothing), True):
        assert near(candidate.scale, 1, 1, 1)
        assert candidate.shift is None or near(candidate.shift, 0, 0, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_block_is_shifted_only_where_a_bias_can_take_it_in(bias: bool) -> None:
    block = block_of(W8A8, bias=bias)
    before = block.error()
    OutlierSuppressionPlus().transform(block)
    norm, up = block.log
    assert {norm.method, up.method} == {"outlier suppression+"} and norm.outcome is Outcome.KEPT
    assert norm.choice.endswith(", shifted") is bias and not up.choice.endswith(", shifted")
    assert block.error() < before
    check_function_is_kept(block)


def test_a_pair_that_feeds_nothing_quantized_is_passed_over() -> None:
    block = block_of(W8A8, kept=("down.weight",))
    OutlierSuppressionPlus(thresholds=2).transform(block)
    assert [line.where for line in block.log] == [block.pairs[0].describe()]
