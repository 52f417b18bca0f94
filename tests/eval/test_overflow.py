"""A model that overflows is refused, and nothing of what it said is kept for the next run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmq.errors import LlmqError
from llmq.inference.pretrained import load_model, load_tokenizer
from llmq_eval import tasks, windows
from llmq_eval.journal import Journal
from llmq_eval.perplexity import measure


@pytest.fixture
def overflowing(tiny_model: Path) -> torch.nn.Module:
    """The logits of every batch but the first are not finite."""
    model: torch.nn.Module = load_model(tiny_model, probe=False)
    seen: list[int] = []

    def overflow(module: torch.nn.Module, given: object, found: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return found if len(seen) == 1 else found * torch.nan

    model.get_output_embeddings().register_forward_hook(overflow)  # type: ignore[operator]
    return model


def test_perplexity(overflowing: torch.nn.Module, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    cut = windows.cut([tiny_model], str(text_file), window=32, max_windows=4, progress=False)
    with (
        Journal(tmp_path / "journal") as journal,
        pytest.raises(LlmqError, match="loss on the text is nan; .* overflows in float32: its weights may be damaged"),
    ):
        measure(overflowing, tiny_model, cut, progress=False, journal=journal)
    assert set(Journal(tmp_path / "journal").done) == {"0"}
    with pytest.raises(LlmqError, match="overflows in bfloat16: try --dtype float32"):
        measure(overflowing.to(torch.bfloat16), tiny_model, cut, progress=False)


@pytest.mark.slow
@pytest.mark.skipif(not tasks.installed(), reason="lm-eval is not installed: pip install 'llmq[eval]'")
def test_tasks(overflowing: torch.nn.Module, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"goal": f"count to {i}", "sol1": "one", "sol2": "two three", "label": i % 2} for i in range(4)]
    (tmp_path / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = tasks.Tasks(["piqa"], tmp_path, tmp_path / "tasks")
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.eos_token = "!"  # lm-eval needs one
    with (
        Journal(tmp_path / "journal") as journal,
        pytest.raises(LlmqError, match="a log likelihood is nan.*--dtype float32"),
    ):
        of.run("piqa", overflowing, tokenizer, tasks.Settings(), journal, shown="float32", progress=False)
    kept = Journal(tmp_path / "journal").done
    assert len(kept) == 1 and all(abs(answer[0]) < 1e4 for answer in kept.values())
