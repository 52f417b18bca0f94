"""Batches of a step are shared out evenly, and what a rank is lent is what the other has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmq import ranks
from llmq.discovery.calls import Call, Recording, States
from llmq.training.lent import Batches
from tests.together import together

COUNT = 6


def batches(handed: Callable[[int], Any] = float) -> Batches:
    """This rank's of six batches, each with its number in it; handed: makes another argument of it."""
    ranks.deal(COUNT, COUNT)
    mine = ranks.mine(COUNT)
    calls = [[Call((None, torch.full((2,), b), handed(b)), {}, 0, None)] for b in mine]
    states = [States(torch.full((3,), float(b))) for b in mine]
    return Batches.dealt(COUNT, states, Recording(calls=calls), [torch.tensor(b) for b in mine])


def run(step: list[int], made: Batches) -> list[tuple[int, ...]]:
    """What a rank has of each batch that it runs."""
    before = made.first.keys() | set()
    with made.shared(step) as mine:
        found = [(b, *map(int, (made.first[b].hidden[0], made.calls[b][0].args[1][1], made.teacher[b]))) for b in mine]
    assert made.first.keys() == made.calls.keys() == made.teacher.keys() == before
    return found


def test_one_process_runs_all_batches_in_their_order() -> None:
    assert run([4, 0, 4], batches()) == [(4,) * 4, (0,) * 4, (4,) * 4]


def test_a_rank_lends_what_is_more_than_its_share() -> None:
    """Some batches are there several times."""
    found = together(3, lambda: run([1, 0, 5, 1, 0, 0], batches()))
    assert found == [[(1,) * 4, (0,) * 4], [(1,) * 4, (0,) * 4], [(5,) * 4, (0,) * 4]]
    assert together(2, lambda: run([0, 1, 2, 2], batches())) == [[(0,) * 4, (1,) * 4], [(2,) * 4, (2,) * 4]]


def test_what_cannot_be_sent_stays_where_it_is() -> None:
    found = together(2, lambda: run([1, 0, 2, 5], batches(lambda batch: lambda: batch)))
    assert [[one[0] for one in mine] for mine in found] == [[1, 0, 2], [5]]


@pytest.mark.parametrize(
    ("step", "runners"),
    [([0, 1, 2, 3], [0, 0, 1, 1]), ([0, 1, 0, 1], [0, 0, 1, 2]), ([4, 0, 5, 4], [2, 0, 2, 1]), ([5], [2])],
)
def test_the_one_that_has_a_batch_runs_it_if_it_can(
    monkeypatch: pytest.MonkeyPatch, step: list[int], runners: list[int]
) -> None:
    monkeypatch.setattr(ranks._group, "size", 3)
    monkeypatch.setattr(ranks._group, "hand", 2)
    assert ranks.evenly(step) == runners
