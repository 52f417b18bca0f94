"""Measured divergences of every small candidate, predicted ones of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq.allocation.scores import divergence
from llmq.grids.scheme import Scheme
from tests.llmq.allocation.tasks import Whole, task


def test_small_candidates_are_measured_and_large_ones_follow(tiny_model: Path) -> None:
    of = task(tiny_model)
    whole = Whole(tiny_model, of)
    losses = divergence.losses(of)
    assert [len(row) for row in losses] == [len(group.candidates) for group in of.groups]
    for g in (0, 4, len(of.groups) - 1):
        assert losses[g][:3] == pytest.approx([whole.rounded({g: c}) for c in range(3)], rel=2e-3)
        # Eight bits: of the same order as what the whole model says, and nearly nothing.
        assert 0 < losses[g][3] < losses[g][2] / 50 and losses[g][4] == 0
        assert losses[g][3] == pytest.approx(whole.rounded({g: 3}), rel=1.5, abs=2e-6)


def test_of_only_large_candidates_the_smallest_is_measured(tiny_model: Path) -> None:
    of = task(tiny_model, candidates=(Scheme(8, 16), Scheme(6, 16), None))
    assert divergence.pairs(of.groups) == [(g, 0) for g in range(len(of.groups))]
    assert all(row[0] > row[1] > row[2] == 0 for row in divergence.losses(of))
