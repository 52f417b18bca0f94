"""Scores are found by their files' names."""

from __future__ import annotations

from llmq.allocation import scores
from llmq.allocation.scores import divergence
from tests.llmq.refusal import refused


def test_scores_are_files() -> None:
    assert {"divergence", "linear", "error"} <= set(scores.names())
    assert not [name for name in scores.names() if name.startswith("_")]
    assert scores.find("divergence") is divergence.losses
    refused(lambda: scores.find("hawk"), "hawk", "divergence", "linear")
