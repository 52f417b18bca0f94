"""Ranks: which batches each has, and that what they tell each other has the bytes of one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmq import ranks
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from tests.together import together

BATCHES = 7


class Named(NamedTuple):
    part: Tensor
    word: str


def values() -> list[Tensor]:
    """A tensor of each batch, so different in size that the order of a sum shows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator) * 10.0 ** (i % 4) for i in range(BATCHES)]


def test_one_process_has_everything_and_waits_for_nobody() -> None:
    assert ranks.size() == 1 and ranks.first() and ranks.mine(3) == [0, 1, 2] and ranks.hands(3) == [range(3)]
    assert ranks.gather(iter("ab")) == ["a", "b"] and ranks.everyone(1) == [1] and ranks.tell("a") == "a"
    assert ranks.share([3.0, 1.0]) == [0, 0] and list(ranks.spread("ab", str.upper)) == [("a", "A"), ("b", "B")]
    assert ranks.own_device("cuda") == "cuda" and ranks.on_this_machine() == 1


@pytest.mark.parametrize(
    ("told", "count"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4"}, 1),  # as other launchers set them
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "x", "LOCAL_WORLD_SIZE": "4"}, 1),
        ({"RANK": "", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 1),
    ],
)
def test_ranks_are_those_that_were_started_as_such(
    told: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*ranks.STARTERS, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert ranks.asked() == count


@pytest.mark.parametrize(("count", "hand"), [(2, 9), (3, 2), (4, 1)])
def test_sums_over_ranks_have_the_bytes_of_one_process(count: int, hand: int) -> None:
    order = [3, 0, 6, 5, 1]

    def work() -> dict[str, Any]:
        ranks.deal(BATCHES, hand)
        mine = ranks.mine(BATCHES)
        own = [values()[batch] for batch in mine]
        first, state = torch.zeros(5), {"total": torch.zeros(5, dtype=torch.float64), "count": 0}

        def add(part: range) -> None:
            for i in part:
                first.add_(own[i])

        def count_in(part: range) -> None:
            for i in part:
                state["total"] = state["total"] + own[i].double()
                state["count"] += 1

        for part in ranks.hands(len(own)):
            ranks.relay([(first, lambda part=part: add(part))])
            ranks.relay_state(state, lambda part=part: count_in(part), torch.device("cpu"))
        parts = dict(zip(mine, own, strict=True))
        return {
            "mine": mine,
            "gathered": ranks.gather(mine),
            "relayed": first,
            "state": state,
            "total": ranks.total(torch.empty(5), parts, order),
            "told": ranks.tell(ranks.rank(), count - 1),
            "spread": list(ranks.spread(range(5), lambda job: (job, ranks.size(), ranks.mine(2)))),
        }

    found = together(count, work)
    assert not [one for one in found if isinstance(one, Exception)], found
    assert sorted(batch for one in found for batch in one["mine"]) == list(range(BATCHES))
    whole, double, ordered = torch.zeros(5), torch.zeros(5, dtype=torch.float64), values()[order[0]].clone()
    for value in values():
        whole.add_(value)
        double = double + value.double()
    for batch in order[1:]:
        ordered.add_(values()[batch])
    for one in found:
        assert one["gathered"] == list(range(BATCHES)) and one["told"] == count - 1
        assert torch.equal(one["relayed"], whole) and torch.equal(one["total"], ordered)
        assert torch.equal(one["state"]["total"], double) and one["state"]["count"] == BATCHES
        # A job is done as one process does it.
        assert one["spread"] == [(job, (job, 1, [0, 1])) for job in range(5)]


def test_all_ranks_fail_if_one_does_and_say_who() -> None:
    def fails(*numbers: int) -> Any:
        def work() -> None:
            with ranks.failing_together():
                if ranks.rank() in numbers:
                    raise LlmqError("no room")

        return work

    found = together(2, fails(1))
    assert all(isinstance(one, ranks.Common) for one in found)
    assert all(str(one).startswith("rank 1 of 2 on ") and str(one).endswith(": no room") for one in found)
    assert [str(one) for one in together(2, fails(0, 1))] == ["no room", "no room"]
    found = together(2, lambda: ranks.agree({"text": ranks.rank(), "model": 1}, "run"))
    assert all("has another run (text) than rank 0" in str(one) for one in found)


def test_a_rank_that_ends_is_noticed_by_those_that_wait_for_it() -> None:
    def work() -> None:
        ranks.everyone(0)
        if ranks.rank() == 1:
            raise LlmqError("mine alone")
        ranks.everyone(1)

    waiting, ended = together(2, work)
    assert isinstance(waiting, ranks.Lost) and "resumes the run" in str(waiting)
    assert str(ended) == "mine alone"


@pytest.mark.parametrize(
    ("costs", "most"), [([1.0] * 12, 4), ([5.0, 1.0, 4.0, 3.0, 3.0, 2.0], 7), ([9.0], 9), ([0.0, 0.0], 0)]
)
def test_each_rank_has_consecutive_jobs_of_about_the_same_cost(
    monkeypatch: pytest.MonkeyPatch, costs: list[float], most: float
) -> None:
    monkeypatch.setattr(ranks._group, "size", 3)
    owners, load = ranks.share(costs), [0.0] * 3
    for cost, owner in zip(costs, owners, strict=True):
        load[owner] += cost
    assert max(load) == most and owners == sorted(owners)


def test_tensors_are_moved_wherever_they_are() -> None:
    value = {"a": [torch.ones(1), 2], "b": (Named(torch.ones(1), "w"), Scheme(4, 8)), "c": None}
    found = ranks.moved(value, "meta")
    assert found["a"][0].is_meta and found["b"][0].part.is_meta and found["b"][0].word == "w"
    assert found["b"][1] == Scheme(4, 8) and found["c"] is None and not value["a"][0].is_meta
