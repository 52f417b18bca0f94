"""What two runs of a block are compared by, token by token, and the sums over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.block.block import WeightState
from llmq.block.moments import Moments, compare, part
from llmq.block.statistics import Hessian
from llmq.discovery.addends import Seen
from llmq.discovery.view import View
from llmq.grids.scheme import Scheme

TOKENS, WIDTH, OUT = 6, 4, 3


def state(name: str = "a", width: int = WIDTH) -> WeightState:
    return WeightState(name, View(name), Scheme(4, None), torch.randn(OUT, width), torch.float32, 0)


def seen(*addends: Tensor, x: Tensor | None = None, products: int = 1, width: int = WIDTH) -> Seen:
    return Seen([torch.randn(2, TOKENS // 2, width) if x is None else x], list(addends), products)


def test_streams_are_compared_where_both_runs_have_one() -> None:
    r, now = torch.randn(TOKENS, OUT), torch.randn(TOKENS, OUT)
    exact, found = seen(r), seen(now)
    apart = compare([state()], [exact], [found], True)
    torch.testing.assert_close(apart.streams["a"], r - now)
    assert apart.drift is not None
    torch.testing.assert_close(apart.drift, exact.rows - found.rows)
    assert compare([state()], [seen(r)], [seen(r)], True).adding == {"a"}
    assert not compare([state()], [seen(r)], [seen(r)], True).streams
    assert not compare([state()], [seen(r)], [seen()], True).adding
    assert not compare([state()], [seen(r, products=2)], [seen(r, products=2)], True).adding


def test_of_several_addends_of_a_part_of_a_block_none_counts() -> None:
    r, s = torch.randn(TOKENS, OUT), torch.randn(TOKENS, OUT)
    assert compare([state()], [seen(r, s)], [seen(s, r)], True).adding == {"a"}
    assert not compare([state()], [seen(r, s)], [seen(s, r)], False).adding
    assert compare([state()], [seen(r)], [seen(s)], False).adding == {"a"}


def test_runs_of_other_numbers_of_tokens_cannot_be_compared() -> None:
    fewer = seen(torch.randn(4, OUT), x=torch.randn(4, WIDTH))
    apart = compare([state()], [fewer], [seen(torch.randn(TOKENS, OUT))], True)
    assert apart.drift is None and not apart.streams and len(apart.rows) == TOKENS
    assert compare([state()], [Seen()], [seen()], True).drift is None


def test_sums_in_parts_are_the_sums_of_all() -> None:
    one = state()
    exact, found = seen(torch.randn(TOKENS, OUT)), seen(torch.randn(TOKENS, OUT))
    apart = compare([one], [exact], [found], True)
    first = torch.arange(TOKENS) % 3 == 0
    whole, parts = (Moments(WIDTH, (), torch.device("cpu")) for _ in range(2))
    whole.update([apart])
    parts.update([apart.of(first)])
    parts.update([apart.of(~first)])
    x = found.rows
    for moments in (whole, parts):
        torch.testing.assert_close(moments.hessian, x.t() @ x)
        by_input, by_stream = moments.terms(one)
        torch.testing.assert_close(by_input, one.value @ (exact.rows - x).t() @ x, rtol=1e-4, atol=1e-4)
        assert exact.stream is not None and found.stream is not None
        torch.testing.assert_close(by_stream, (exact.stream - found.stream).t() @ x, rtol=1e-4, atol=1e-4)
    assert isinstance(whole.statistics[Hessian], Hessian) and whole.statistics[Hessian].count == TOKENS
    some = torch.tensor([2, 0])
    torch.testing.assert_close(whole.terms(one, some)[1], whole.terms(one)[1][some])
    wanted = apart.wanted(one, some)
    assert wanted is not None and apart.drift is not None
    torch.testing.assert_close(wanted, apart.drift @ one.value[some].t() + apart.streams["a"][:, some])


@pytest.mark.parametrize("width", [2 * OUT, 2 * OUT + 3])
def test_few_outputs_have_sums_of_their_own(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ W (x − x̂) x̂ᵀ is summed as such, from rows of the weight in turn: there is no sum [in, in] of the drift."""
    monkeypatch.setattr("llmq.grids.base.ROWS", 2)
    one = state(width=width)
    exact, found = seen(torch.randn(TOKENS, OUT), width=width), seen(torch.randn(TOKENS, OUT), width=width)
    compared = compare([one], [exact], [found], True)
    apart = compared.multiplied([one])
    assert apart.drift is None and compared.drift is not None
    drift, x = exact.rows - found.rows, found.rows
    torch.testing.assert_close(apart.outputs["a"], drift @ one.value.t())
    first = torch.arange(TOKENS) % 3 == 0
    moments = Moments(width, (), torch.device("cpu"))
    moments.update([compared.of(tokens).multiplied([one]) for tokens in (first, ~first)])
    assert moments.drift is None and moments.drifts
    by_input, by_stream = moments.terms(one)
    torch.testing.assert_close(by_input, one.value @ drift.t() @ x, rtol=1e-4, atol=1e-4)
    assert exact.stream is not None and found.stream is not None
    some = torch.tensor([2, 0])
    wanted = apart.wanted(one, some)
    assert wanted is not None
    streams = exact.stream - found.stream
    torch.testing.assert_close(wanted, drift @ one.value[some].t() + streams[:, some], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_stream, streams.t() @ x, rtol=1e-4, atol=1e-4)


def test_more_outputs_have_a_drift() -> None:
    one = state(width=2 * OUT - 1)
    exact, found = seen(torch.randn(TOKENS, OUT), width=2 * OUT - 1), seen(torch.randn(TOKENS, OUT), width=2 * OUT - 1)
    apart = compare([one], [exact], [found], True)
    assert apart.multiplied([one]) is apart and apart.drift is not None and not apart.outputs


def test_rows_of_a_sum_do_not_keep_it() -> None:
    total = torch.randn(6, 3)
    assert part(total, slice(0, 6)) is total
    some = part(total, slice(2, 4))
    assert torch.equal(some, total[2:4]) and some.untyped_storage().nbytes() == some.nbytes
