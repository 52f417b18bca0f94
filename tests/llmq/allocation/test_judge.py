"""The divergence of logits from last hidden states, against the whole model's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq.allocation.judge import judging
from llmq.streaming.block_reader import BlockReader
from tests.architectures import tiny
from tests.llmq.allocation.tasks import CPU, task


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_divergences_are_those_of_the_models_logits(kind: str, tmp_path: Path) -> None:
    tiny.make(kind, tmp_path / "m")
    of = task(tmp_path / "m")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    last = whole.get_submodule(of.plan.blocks[-1].name)
    kept: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _, __, out: kept.append(out if isinstance(out, torch.Tensor) else out[0]))
    ids = of.batches[0]
    other = ids.flip(1)
    with torch.no_grad():
        base, changed = whole(ids).logits.log_softmax(-1), whole(other).logits.log_softmax(-1)
    hook.remove()
    expected = (base.exp() * (base - changed)).sum(-1).flatten().double()
    with judging(BlockReader(of.plan, CPU), kept[0], ids.shape) as judge:
        found = judge.divergence(kept[0], kept[1], ids.shape)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
        assert float(judge.divergence(kept[0], kept[0], ids.shape).abs().max()) == 0
        name = next(n for n in judge.tail.parameters if judge.known[n].dim() == 2)
        doubled = judge.divergence(kept[0], kept[0], ids.shape, {name: judge.known[name] * 1.2})
        assert float(doubled.min()) > 0
        assert torch.equal(of.plan.model.get_parameter(name).detach(), judge.known[name])
    assert all(p.is_meta for p in of.plan.model.parameters())
