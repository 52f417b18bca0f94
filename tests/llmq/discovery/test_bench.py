"""A block on trial: what a change does to its products and its output, and that its call is left as it was."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from llmq.discovery import parameters
from llmq.discovery.bench import Bench, Run, Unsteady, Use, _alive, difference, followed, run_to_fill, unchanged
from llmq.discovery.calls import Call
from tests.llmq.discovery.made import INNER, TOKENS, WIDTH, Made, fc, mlp


def bench(block: nn.Module, *rest: Any, shape: tuple[int, ...] = (1, TOKENS, WIDTH)) -> Bench:
    """A block with random parameters on trial."""
    with parameters.randomize(block):
        fixed = {name: p.detach().clone() for name, p in block.named_parameters()}
    for name, value in fixed.items():
        parameters.assign(block, name, value)
    return Bench(block, Call((None, *rest), {}, 0, None), torch.zeros(shape))


def test_apart_is_the_relative_distance_in_float64() -> None:
    base = torch.tensor([3.0, 4.0])
    assert difference(torch.tensor([3.0, 9.0]), base) == pytest.approx(1.0)
    assert difference(base, base) == 0.0 and difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert difference(torch.full((2,), 1e30), torch.full((2,), 2e30)) == pytest.approx(0.5)  # squares exceed float32
    for value, other in (
        (torch.ones(3), base),
        (torch.tensor([3.0, math.nan]), base),
        (torch.tensor([math.inf, 1.0]), base),
        (torch.ones(2), torch.zeros(2)),
    ):
        assert difference(value, other) == math.inf


def test_runs_with_other_outputs_are_infinitely_apart() -> None:
    one, two = Run([], [torch.ones(2)]), Run([], [torch.ones(2), torch.ones(1)])
    assert one.difference(two) == math.inf and one.difference(one) == 0.0 and Run([], []).difference(Run([], [])) == 0.0
    assert Run([], [torch.ones(2), torch.full((1,), 3.0)]).difference(two) == pytest.approx(2.0)


def test_products_are_seen_with_their_inputs() -> None:
    block = mlp()
    on_trial = bench(block)
    run = on_trial.run()
    assert [use.parameter for use in run.uses] == ["gate.weight", "up.weight", "down.weight"]
    (hidden,) = on_trial.hidden
    y = block.norm(hidden).reshape(-1, WIDTH)  # type: ignore[operator]
    assert torch.allclose(run.uses[0].input, y, atol=1e-6) and torch.equal(run.uses[0].input, run.uses[1].input)
    assert torch.allclose(run.output[0], block(hidden), atol=1e-6)
    assert run.path() == on_trial.base.path() and run.difference(on_trial.base) == 0.0


def test_there_are_samples_enough_and_single_tokens_make_more() -> None:
    for tokens in (1, 8, 64):
        on_trial = bench(mlp(), shape=(1, tokens, WIDTH))
        samples = sum(hidden.numel() // WIDTH for hidden in on_trial.hidden)
        assert samples >= 32 and sum(hidden.shape[0] for hidden in on_trial.hidden) >= 4


def test_other_values_are_for_one_run() -> None:
    block = mlp()
    on_trial = bench(block)
    before = dict(block.named_parameters())
    doubled = on_trial.run({"down.weight": 2 * before["down.weight"].detach()})
    hidden = torch.cat(on_trial.hidden)
    change, base = doubled.output[0] - hidden, on_trial.base.output[0] - hidden
    assert torch.allclose(change, 2 * base, atol=1e-5)
    assert all(now is before[name] for name, now in block.named_parameters())
    assert on_trial.run().difference(on_trial.base) == 0.0


def test_a_batch_that_is_not_its_rows_is_run_row_by_row() -> None:
    """As in a model whose tables are made for one sequence, or whose tokens see those of other rows."""
    mixing = Made(lambda m, x: x + m.up(x) + x.mean(0), up=fc(WIDTH, WIDTH))
    refusing = Made(lambda m, x: x + m.up(x).view(1, TOKENS, WIDTH), up=fc(WIDTH, WIDTH))
    plain = Made(lambda m, x: x + m.up(x), up=fc(WIDTH, WIDTH))
    assert [len(bench(block).hidden) for block in (mixing, refusing, plain)] == [4, 4, 1]


def test_a_block_that_is_not_the_same_twice_is_refused() -> None:
    calls = iter(range(1000))

    def turns(m: Any, x: Tensor) -> Tensor:
        return x + (m.up if next(calls) % 2 else m.down)(x)

    for body in (lambda m, x: x + m.up(x) + torch.randn_like(x), turns):
        with pytest.raises(Unsteady):
            bench(Made(body, up=fc(WIDTH, WIDTH), down=fc(WIDTH, WIDTH)))


def test_products_that_depend_on_the_input_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + (m.up if float(x.mean()) > 0 else m.down)(x).view(1, 2, WIDTH)

    with pytest.raises(Unsteady, match="which products the block makes depends on its input"):
        bench(Made(forward, up=fc(WIDTH, WIDTH), down=fc(WIDTH, WIDTH)), shape=(1, 2, WIDTH))


def test_more_samples_are_drawn_where_a_channel_is_almost_never_active() -> None:
    """Behind a ReLU with a threshold; not without end where a channel never is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.down(relu(m.up(x) - m.least))

    def samples(least: Tensor) -> int:
        block = Made(forward, up=fc(INNER, WIDTH), down=fc(WIDTH, INNER))
        block.register_buffer("least", least)
        return sum(hidden.numel() // WIDTH for hidden in bench(block).hidden)

    assert samples(torch.zeros(INNER)) == 32
    assert 32 < samples(torch.full((INNER,), 1.2)) <= 512
    never = torch.zeros(INNER)
    never[3] = 1e9
    assert samples(never) == 32


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_what_a_block_leaves_is_part_of_its_output_and_not_of_the_call(kind: Callable[[], Any]) -> None:
    def forward(m: Any, x: Tensor, store: Any, seen: list[Tensor]) -> Tensor:
        store["values"] = m.up(x)
        seen.append(x)
        return x

    store, seen = kind(), list[Tensor]()
    on_trial = bench(Made(forward, up=fc(WIDTH, WIDTH)), store, seen)
    assert not store and not seen
    assert len(on_trial.run().output) == 3


def test_hidden_states_of_another_kind_are_not_zeros() -> None:
    """A structural run on zeros leaves zeros for them, through which nothing would be seen; a mask stays."""
    given: dict[str, Tensor] = {}

    def forward(m: Any, x: Tensor, other: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        given.update(other=other, mask=mask, ids=ids)
        return x + m.up(x)

    mask, ids = torch.ones(1, 1, 4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    bench(Made(forward, up=fc(WIDTH, WIDTH)), torch.zeros(2, 3), mask, ids)
    assert given["other"].any() and torch.equal(given["mask"], mask.float()) and given["mask"].dtype == torch.float32
    assert torch.equal(given["ids"], ids)


def test_factors_lie_where_they_are_said_to() -> None:
    on_trial = bench(mlp())
    some = on_trial.random(1000)
    assert 0.5 <= float(some.min()) < 0.52 and 1.48 < float(some.max()) <= 1.5
    factors = on_trial.distinct(100)
    ordered = factors.sort().values
    assert float(ordered.diff().min()) > 0.007 and not torch.equal(factors, ordered)
    assert not ((factors > 0.901) & (factors < 1.099)).any()
    assert (float(ordered[0]), float(ordered[-1])) == pytest.approx((0.5, 1.5))


def test_columns_are_followed_to_the_channel_that_feeds_them() -> None:
    factors = torch.tensor([0.6, 1.4, 1.2, 0.8])
    base = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    base[:, 6] = 0
    base[3, 6] = 1.0  # one sample alone gets through: it would follow anything
    channel = torch.tensor([2, 0, 0, 3, 1, 1, 2])
    new = base * factors[channel]
    new[:, 3] = base[:, 3] * 1.1  # by none of the factors
    new[:, 5] = base[:, 5] * factors[1] + 0.01 * base[:, 0]  # not by one factor for all tokens
    assert followed(base, new, factors).tolist() == [2, 0, 0, -1, 1, -1, -1]
    assert followed(base, base, factors).tolist() == [-1] * 7
    assert followed(base[:, :2], base[:, :2] * 0.7, torch.tensor([0.7])).tolist() == [0, 0]


def test_calls_are_given_back_what_they_held() -> None:
    store, seen = {"a": 1}, [1, 2]
    calls = [Call((None, seen), {"store": store}, 0, None), Call((None,), {"store": store}, 0, None)]
    with pytest.raises(KeyError), unchanged(calls):
        store["b"] = 2
        seen.clear()
        raise KeyError
    assert (store, seen) == ({"a": 1}, [1, 2]) and calls[0].kwargs["store"] is store


def test_a_block_leaves_what_later_ones_take() -> None:
    ran: list[int] = []

    def forward(m: Any, x: Tensor, store: Any = None) -> Tensor:
        ran.append(1)
        if store is not None:
            store["values"] = m.up(x)
        return x

    block, hidden, store = Made(forward, up=fc(WIDTH, WIDTH)), torch.zeros(1, 3, WIDTH), dict[str, Tensor]()
    run_to_fill(block, Call((None,), {}, 0, None), hidden)
    assert not ran
    run_to_fill(block, Call((None, store), {}, 0, None), hidden, seed=4)
    noise = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(store["values"], block.up(noise).detach())  # type: ignore[operator]


def test_a_use_tells_what_it_was() -> None:
    run = Run([Use("a", torch.ones(3, 2), True, False, 1), Use("b", torch.ones(4, 5), False, True, None)], [])
    assert run.path() == [("a", torch.Size([3, 2])), ("b", torch.Size([4, 5]))]


def test_inputs_without_rows_have_no_column_that_is_alive() -> None:
    """Of an expert that no sample chose."""
    assert not _alive(torch.zeros(0, 5)).any() and _alive(torch.zeros(0, 5)).shape == (5,)
    assert _alive(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [True, False]
