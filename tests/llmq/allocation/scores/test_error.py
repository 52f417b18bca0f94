"""Relative squared errors of the weights alone, read one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq.allocation.scores import error
from llmq.allocation.scores._linear import squared_error
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq.allocation.tasks import Whole, task


@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral", "granitemoe"])
def test_errors_are_those_of_the_weights_in_the_whole_model(kind: str, tmp_path: Path) -> None:
    tiny.make(kind, tmp_path / "m")
    of = task(tmp_path / "m", Recipe(("rtn",), Scheme(4, 16), loader="llmq"))
    whole = Whole(tmp_path / "m", of)
    losses = error.losses(of)
    for g in {0, len(of.groups) - 1, *(g for g, group in enumerate(of.groups) if group.experts)}:
        group = of.groups[g]
        for c, scheme in enumerate(group.candidates):
            sums = sum(squared_error(whole.part(group, weight), scheme, of.scale_dtype) for weight in group.weights)
            assert losses[g][c] == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
        assert losses[g][-1] == 0
