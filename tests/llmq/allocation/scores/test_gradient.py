"""The score by gradients: against autograd on the whole model, and against the divergence itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq import demo
from llmq.allocation.scores import _backward as module
from llmq.allocation.scores import gradient
from llmq.data.calibration import windows
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration
from tests.architectures import tiny
from tests.llmq.allocation.scores.dense import IDS, changes_of, losses_of, task_of


# Of gptq a code may differ where two are as near; of rtn none does.
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "rtn"), ("gpt_neox", "gptq"), ("gemma2", "gptq"), ("phi3", "gptq")]
)
def test_scores_are_those_of_the_whole_model(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with fused matrices, matrices stored as [in, out], tied embeddings and a soft limit on logits."""
    monkeypatch.setattr(module, "SAMPLES", 8)
    task = task_of(tiny.make(kind, tmp_path / "model"), method=method)
    found = gradient.losses(task)
    wanted = losses_of(task, tiny.model(kind), module.pieces(IDS), IDS, diagonal=False)
    for group, mine, other in zip(task.groups, found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=2e-2), group.name
        assert mine[group.candidates.index(None)] == 0 and min(mine) >= 0
        assert mine[0] > 0


def test_errors_that_cancel_cost_nothing() -> None:
    ones = torch.ones(2, 3)
    assert float(gradient.measure([ones, ones], [ones, ones])) == 144
    assert float(gradient.measure([ones, ones], [ones, -ones])) == 0


@pytest.mark.slow
def test_it_predicts_the_divergence_of_the_demo_model() -> None:
    """Groups rounded alone: 3 bits, where a change is small; within the noise of 32 samples on few tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    ids = windows(Calibration("demo", 8, 128), tokenizer).ids
    task = task_of(demo.path(), ids, [Scheme(3, 128)], method="rtn", batch=4)
    found = [row[0] for row in gradient.losses(task)]
    whole = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    base = predicted(whole, ids)
    changes, true = changes_of(task, whole, ids[:1]), []
    for group, (change,) in zip(task.groups, changes, strict=True):
        block = whole.get_submodule(task.plan.blocks[group.block or 0].name)
        for sign in (1, -1):
            for weight, one in zip(group.weights, change or [], strict=True):
                assert weight.view is not None
                weight.view.get(block).add_(one, alpha=sign)
            if sign == 1:
                true.append(float((base.exp() * (base - predicted(whole, ids))).sum(-1).mean()))
    logs = torch.tensor([found, true]).log()
    assert torch.corrcoef(logs)[0, 1] > 0.8
    assert (logs[0] - logs[1]).abs().mean() < 0.5


def predicted(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The logarithms of the probabilities of tokens."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits.log_softmax(-1)
    return found
