"""What follows the last block, in a plan: who gets it, what it weighs, and why a model has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmq.discovery.names import Links
from llmq.planning import budget
from llmq.planning.memory import Budget, Load
from llmq.planning.tail import OWN, set_tail, tail_bytes
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.planning.made import make


def test_only_methods_that_learn_from_logits_have_it(tiny_model: Path) -> None:
    assert make(tiny_model, methods=("gptq",)).tail is None
    assert make(tiny_model, methods=("signround",), options={"last": "output"}).tail is None
    for method in ("signround", "block_qat"):
        plan = make(tiny_model, methods=(method,))
        assert plan.tail is not None and not [w for w in plan.warnings if OWN in w]
        assert plan.tail.parameters == ("lm_head.weight", "model.norm.weight")
        assert all(p.device.type == "meta" for p in plan.model.parameters())


def test_the_last_block_s_memory_has_its_parameters(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Load]] = []
    plan = make(tiny_model, methods=("signround",))

    def predict(*args: Any, **more: Any) -> Budget:
        found.append(args[6])
        return plan.budget

    monkeypatch.setattr(budget, "predict", predict)
    budget.budget(plan, "cpu")
    (first, _, last), (held, work) = found[0], tail_bytes(plan)
    assert last == replace(first, block=first.block + held, workspace=first.workspace + work)
    assert held == 4 * (256 * 64 + 64) + plan.dtype.itemsize * 256 * 64 and work > 0
    plan.tail = None
    assert tail_bytes(plan) == (0, 0)


def test_experts_are_learned_from_their_own_output(tmp_path: Path) -> None:
    plan = make(mixtures.write("qwen3_moe", tmp_path), group=16, methods=("signround",))
    assert plan.tail is None and any(w == f"{OWN}: it has routed experts" for w in plan.warnings)


def test_why_there_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(tiny.make("gemma3n_text", tmp_path), group=None, methods=("signround",))
    assert plan.tail is None and any(w.startswith(OWN) and "not of each token" in w for w in plan.warnings)


def test_parameters_that_the_checkpoint_lacks(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(tiny_model, methods=("signround",))
    plan.tail = None
    real = Links.tensors
    monkeypatch.setattr(Links, "tensors", lambda self, name: () if "head" in name else real(self, name))
    assert set_tail(plan) == [f"{OWN}: the checkpoint has no tensor for lm_head.weight"] and plan.tail is None
