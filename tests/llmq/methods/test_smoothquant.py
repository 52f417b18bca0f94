"""SmoothQuant: the scales of equation 4 by hand, what alpha may be, and outliers that leave a block's inputs."""

from __future__ import annotations

import pytest

from llmq.block.attempt import Outcome
from llmq.block.statistics import Inputs
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.smoothquant import SmoothQuant
from tests.llmq.methods.made import block_of, by_name, check_function_is_kept, facts, near, row
from tests.llmq.refusal import refused

W8A8 = Scheme(8, None, activations=Activations())


def test_smoothquant_equation_4() -> None:
    """s = max|x|^α / max|w|^(1−α): with max|x| = (2, 64, 16), max|w| = (4, 1, 2)."""
    found = by_name(SmoothQuant()._candidates(facts()))
    assert list(found) == [f"α {i / 10:g}" for i in range(11)]
    # α 0.5: (√2/2, 8, 4/√2) = (0.7071, 8, 2.8284), over √(0.7071 · 8) = 2.3784.
    assert near(found["α 0.5"].scale, 0.29730, 3.36359, 1.18921)
    # α 0: 1/max|w| = (0.25, 1, 0.5), over 0.5.
    assert near(found["α 0"].scale, 0.5, 2, 1)
    # α 1: max|x|, over √128.
    assert near(found["α 1"].scale, *(v / 128**0.5 for v in (2, 64, 16)))
    assert list(by_name(SmoothQuant(alpha=0.8)._candidates(facts()))) == ["α 0.8"]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, 85])
def test_smoothquant_alpha_is_a_share(alpha: float) -> None:
    refused(lambda: SmoothQuant(alpha=alpha), "alpha must lie between 0 and 1", "leave it out")


@pytest.mark.parametrize("alpha", [0, 1])
def test_all_or_nothing_of_it_may_move(alpha: float) -> None:
    assert list(by_name(SmoothQuant(alpha=alpha)._candidates(facts()))) == [f"α {alpha}"]


def test_channels_that_are_always_0_count_as_nearly_0() -> None:
    """Largest inputs (2, 64, 0) and weights (4, 1, 2), then (2, 64, 16) and (4, 1, 0): the 0 counts as 1e-5."""
    smooth = by_name(SmoothQuant(alpha=0.5)._candidates(facts(high=row(1, 32, 0))))["α 0.5"]
    ends = (64 * 5e-6) ** 0.25  # √(largest · smallest), the largest √64 and the smallest √(1e-5 / 2)
    assert near(smooth.scale, 0.5**0.5 / ends, 8 / ends, 5e-6**0.5 / ends)
    smooth = by_name(SmoothQuant(alpha=0)._candidates(facts(weight=row(4, 1, 0))))["α 0"]
    assert near(smooth.scale, 0.25 / 25e3**0.5, 1 / 25e3**0.5, 1e5 / 25e3**0.5)


def test_outliers_leave_the_inputs_of_a_block_and_its_function_stays() -> None:
    block = block_of(W8A8)
    before, spread = block.error(), evenness(block.weights["gate.weight"].statistics[Inputs])
    SmoothQuant().transform(block)
    assert [line.method for line in block.log] == ["smoothquant"] * 2
    assert block.log[0].outcome is Outcome.KEPT and block.log[0].choice.startswith("α ")
    assert block.error() < before
    check_function_is_kept(block)
    block.observe((Inputs,))
    assert evenness(block.weights["gate.weight"].statistics[Inputs]) < spread / 3


def evenness(inputs: Inputs) -> float:
    """The largest magnitude of a channel over that of the median channel."""
    largest = inputs.low.abs().maximum(inputs.high)
    return float(largest.max() / largest.median())


def test_a_pair_that_feeds_nothing_quantized_is_passed_over() -> None:
    block = block_of(W8A8, kept=("down.weight",))
    SmoothQuant(alpha=0.5).transform(block)
    assert [line.where for line in block.log] == [block.pairs[0].describe()]
