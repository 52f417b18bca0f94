"""The plan: what becomes of each weight, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llmq.planning.made import make


def test_everything_is_accounted_for(tiny_model: Path) -> None:
    plan = make(tiny_model)
    assert {i.name for i in plan.weights if i.scheme} == {
        f"model.layers.{layer}.{part}"
        for layer in range(3)
        for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    }
    assert {i.name: str(i.reason) for i in plan.weights if not i.scheme} == {
        "model.embed_tokens": "outside the decoder blocks",
        "lm_head": "outside the decoder blocks",
    }
    assert sum(i.before for i in plan.weights) <= plan.source.total_bytes
    assert plan.bits_per_weight == pytest.approx(4 + 32 / 32 + 128 / (64 * 64), abs=0.05)  # float32 scales, the shapes


def test_rtn_needs_no_text(tiny_model: Path) -> None:
    assert "none needed" in make(tiny_model, methods=("rtn",)).calibration.description
    assert (
        "none needed" not in make(tiny_model, methods=("rtn",), options={"range": "weighted"}).calibration.description
    )
