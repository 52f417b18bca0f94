"""Statistics of a pass over the batches of several ranks have the bytes of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmq import ranks
from llmq.block.block import Block
from llmq.block.statistics import Hessian, Inputs, MeanSquare
from llmq.grids.histogram import Magnitudes
from llmq.grids.scheme import Scheme
from tests.llmq.methods.test_signround import block_of
from tests.together import together

KINDS = (Hessian, MeanSquare, Inputs, Magnitudes)


def observed(block: Block) -> list[dict[str, Any]]:
    outputs = block.observe(KINDS)  # type: ignore[arg-type]
    assert len(outputs) == len(block.inputs)
    states = list(block.weights.values())
    return [vars(state.statistics[kind]) for state in states for kind in KINDS] + [{"error": block.error()}]


@pytest.mark.parametrize("hand", [1, 9])
def test_statistics_are_those_of_one_process(hand: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several parts of 32 and 16 rows.
    monkeypatch.setattr("llmq.block.products.LEAST", 5)
    whole = observed(block_of(Scheme(4, 8), batches=5))

    def work() -> list[dict[str, Any]]:
        ranks.deal(5, hand)
        block, mine = block_of(Scheme(4, 8), batches=5), ranks.mine(5)
        block.inputs = [block.inputs[i] for i in mine]
        block.calls = [block.calls[i] for i in mine]
        block.target = [block.target[i] for i in mine]
        return observed(block)

    for found in together(3, work):
        assert isinstance(found, list), found
        for one, other in zip(whole, found, strict=True):
            for name, value in one.items():
                same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
                assert same, name


def test_the_hessian_is_the_sum_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.block.products.LEAST", 3)
    x, hessian = torch.randn(2, 6, 10), Hessian(10, torch.device("cpu"))
    hessian.update(x)
    exact = x.flatten(0, 1).double()
    torch.testing.assert_close(hessian.total.double(), exact.t() @ exact, rtol=1e-5, atol=1e-5)
    assert hessian.count == 12 and len(hessian.sums()) == 4
