"""Which gains of norms are trained, and how they are stored."""

from __future__ import annotations

from pathlib import Path

import torch

from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.training.trained import Norm, norm_of
from tests.architectures import tiny
from tests.llmq.training.whole import student_of


def test_every_gain_and_no_bias(tmp_path: Path) -> None:
    """gpt_neox has biases beside its norms and matrices; all have one axis."""
    model = tiny.make("gpt_neox", tmp_path / "model")
    recipe = Recipe(methods=("rtn", "distill"), scheme=Scheme(4, 32))
    with student_of(model, tmp_path / "out", recipe) as student:
        blocks = student.io.plan.blocks
        inside = [f"{b.name}.{n}.weight" for b in blocks for n in ("input_layernorm", "post_attention_layernorm")]
        assert [*student.norms] == [*inside, "gpt_neox.final_layer_norm.weight"]
        io, name = student.io, inside[0]
        norm = norm_of(io, name, blocks[0].unit)
        assert norm is not None and torch.equal(norm.value, io.sink.read(name))
        assert abs(norm.size - float(norm.value.square().mean().sqrt())) < 1e-6
        assert norm_of(io, name, "another unit") is None and norm_of(io, "no.such", None) is None
        # A tensor that is two parameters would have two values.
        io.plan.links.source["twin"] = io.plan.links.source[name]
        assert norm_of(io, name, None) is None


def test_a_gain_moves_in_its_stored_dtype() -> None:
    value = torch.tensor([2.0, -1.0, 0.003], dtype=torch.bfloat16)
    norm = Norm("x", value, 2.0)
    assert norm.moved(torch.zeros(3)) is value
    moved = norm.moved(torch.tensor([0.5, 0.0, 1e-6]))
    assert moved.dtype == torch.bfloat16 and moved.tolist() == [3.0, -1.0, value[2].item()]
