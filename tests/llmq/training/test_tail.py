"""The divergence of the two tails: some tokens at a time, with an output embedding that is quantized, and its zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.discovery import tail as pieces
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.conftest import write_tiny_model
from tests.llmq.training.whole import IDS, divergence, student_of, whole_model

RECIPE = Recipe(methods=("rtn", "distill"), scheme=Scheme(3, 32))


def test_some_tokens_at_a_time_are_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_model(tmp_path / "model", layers=2)
    with student_of(model, tmp_path / "out", RECIPE) as student:
        tail = student.tail
        assert tail.found.apart
        hidden = tail.teacher[1] + 0.1 * torch.randn(tail.teacher[1].shape, generator=torch.Generator().manual_seed(1))
        found = []
        for size in (1 << 24, 2 * 256 * 7):
            monkeypatch.setattr(pieces, "PIECE", size)
            total, slope, sums = tail.slope(1, hidden)
            assert total == pytest.approx(tail.divergence(1, hidden), rel=1e-5)
            found.append((total, slope, sums["model.norm.weight"]))
        (total, slope, norm), (other, slope_of_other, norm_of_other) = found
        assert total == pytest.approx(other, rel=1e-5) and total > 0.01
        assert torch.allclose(slope, slope_of_other, atol=1e-5) and torch.allclose(norm, norm_of_other, atol=1e-4)
        assert tail.divergence(1, tail.teacher[1]) == pytest.approx(0, abs=1e-4)
    assert all(p.is_meta for p in student.io.plan.model.parameters())


def test_a_quantized_output_embedding_is_the_students_alone(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", layers=2)
    recipe = Recipe(methods=("rtn", "distill"), scheme=Scheme(3, 32), include=("lm_head",))
    with student_of(model, tmp_path / "out", recipe) as student:
        base, other, _ = whole_model(student, model)
        (weight,) = student.io.plan.outside.values()
        other.lm_head.weight.data = student.io.read_back(weight)
        with torch.no_grad():
            wanted = float(divergence(base, other, IDS[:2]))
        assert student.loss([0]) == pytest.approx(wanted, rel=1e-4)
