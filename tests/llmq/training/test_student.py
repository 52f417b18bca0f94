"""The streamed gradients, against autograd on the whole model at once and against finite differences in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.grids.base import QuantizedWeight
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.training import student as module
from llmq.training.student import StreamedStudent
from tests.architectures import tiny
from tests.llmq.training.whole import IDS, dequantized, divergence, student_of, whole_model

RECIPE = Recipe(methods=("rtn", "distill"), scheme=Scheme(3, 32, False))
BATCHES = (0, 2)
ROWS = IDS[[0, 1, 4, 5]]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smooth function whose gradient is computed: scales are not rounded to their dtype, nor weights to float32."""
    factors: dict[int, tuple[QuantizedWeight, Tensor]] = {}

    def scaled(q: QuantizedWeight, factor: Tensor) -> QuantizedWeight:
        made = replace(q)
        factors[id(made)] = made, factor
        return made

    def value(self: StreamedStudent, q: QuantizedWeight) -> Tensor:
        return dequantized(q, factors[id(q)][1].double())

    monkeypatch.setattr(module, "scaled_by", scaled)
    monkeypatch.setattr(StreamedStudent, "value", value)


def gradients(student: StreamedStudent) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients of a step."""
    found: dict[str, Tensor] = {}

    def keep() -> None:
        for name, parameter in student.parameters.items():
            if parameter.grad is not None:
                assert name not in found
                found[name] = parameter.grad.clone()
                parameter.grad = None

    return student.descend(BATCHES, keep), found


def moved(student: StreamedStudent) -> None:
    """Parameters somewhere, not at their start."""
    chance = torch.Generator().manual_seed(3)
    for parameter in student.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2"])
def test_gradients_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Also with a soft limit on logits, tied embeddings and norms that multiply by 1 + w (gemma2)."""
    model = tiny.make(kind, tmp_path / "model")
    with student_of(model, tmp_path / "out", RECIPE) as student:
        loss, found = gradients(student)
        assert found.keys() == student.parameters.keys()
        assert len(student.norms) > 2 * len(student.io.plan.blocks)
        base, other, leaves = whole_model(student, model)
        wanted = divergence(base, other, ROWS)
        wanted.backward()
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
        for name, leaf in leaves.items():
            assert leaf.grad is not None and leaf.grad.norm() > 0
            assert (found[name] - leaf.grad).norm() < 1e-3 * leaf.grad.norm(), name
        assert student.loss(BATCHES) == pytest.approx(loss, rel=1e-6)


def test_gradients_are_finite_differences(tmp_path: Path, exact: None) -> None:
    """In float64, on a model whose norms do not compute in float32, far from the start."""
    model = tiny.make("gpt_neox", tmp_path / "model")
    with student_of(model, tmp_path / "out", RECIPE, torch.float64) as student:
        for norm in student.norms.values():
            norm.value = norm.value.double()
        moved(student)
        _, found = gradients(student)
        chance = torch.Generator().manual_seed(4)
        for name, parameter in student.parameters.items():
            direction = torch.randn(parameter.shape, generator=chance)
            direction /= direction.norm()
            start, losses = parameter.detach().clone(), []
            for side in (1, -1):
                parameter.data = start + side * 2**-8 * direction
                losses.append(student.loss(BATCHES))
            parameter.data = start
            slope = float((found[name].double() * direction.double()).sum())
            size = float(found[name].norm()) / parameter.numel() ** 0.5
            assert (losses[0] - losses[1]) / 2**-7 == pytest.approx(slope, rel=2e-3, abs=2e-2 * size), name
