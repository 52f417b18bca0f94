"""The score by the diagonal of the Fisher information, against autograd on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.allocation.scores import _backward as module
from llmq.allocation.scores import fisher
from tests.architectures import tiny
from tests.llmq.allocation.scores.dense import IDS, losses_of, task_of


# Of gptq a code may differ where two are as near; of rtn none does.
@pytest.mark.parametrize(("kind", "method"), [("llama", "rtn"), ("phi3", "gptq")])
def test_scores_are_those_of_the_whole_model(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLES", 8)
    task = task_of(tiny.make(kind, tmp_path / "model"), method=method)
    found = fisher.losses(task)
    wanted = losses_of(task, tiny.model(kind), module.pieces(IDS), IDS, diagonal=True)
    for group, mine, other in zip(task.groups, found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=2e-3), group.name
        # More bits, less loss: a diagonal has no noise of signs.
        assert mine[0] > mine[1] > mine[2] == 0


def test_errors_add_up() -> None:
    ones = torch.ones(2, 3)
    assert float(fisher.measure([ones, 2 * ones], [ones, -ones])) == 6 + 24
