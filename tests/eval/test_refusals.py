"""What `llmq eval` refuses before it measures anything, in words that say the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Run, write_tokenizer
from tests.llmq.report.page.reports import report


def test_folders_of_different_bases(tmp_path: Path, llmq: Run) -> None:
    from llmq.checkpoint.files import REPORT

    for name, base in {"a": "org/x", "b": "org/y"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / REPORT).write_text(report(2, model=base).to_json())
    done = llmq("eval", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "these folders have different bases" in said
    assert f"{tmp_path / 'a'}: org/x; {tmp_path / 'b'}: org/y" in said and "give --base" in said


@pytest.mark.parametrize("limit", ["inf", "0"])
def test_limits_that_are_no_number(limit: str, llmq: Run) -> None:
    done = llmq("eval", "demo", "--tasks", "piqa", "--limit", limit)
    assert done.returncode == 2 and f"below 1, not {limit}" in " ".join(done.stderr.split())


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", *([] if torch.cuda.is_available() else ["cuda"])])
def test_devices_that_are_not_there(device: str, tmp_path: Path, llmq: Run) -> None:
    """Before the model is looked for: a folder that is not there is not what is complained of."""
    done = llmq("eval", tmp_path / "none", "--device", device, "--out", tmp_path / "out")
    assert done.returncode == 2 and f"error: --device {device} cannot be used here" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_a_window_that_the_models_code_cannot_take(tmp_path: Path, text_file: Path, llmq: Run) -> None:
    """Its config does not say how many tokens it takes: an error of its code is one line with the way out."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    config = MptConfig(d_model=64, n_heads=4, n_layers=1, expansion_ratio=2, vocab_size=256, max_seq_len=32)
    MptForCausalLM(config).save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    given = ("eval", tmp_path / "m", "--text", text_file, "--limit", "2", "--out", tmp_path / "out")
    done = llmq(*given, "--window", 64)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "fails on windows of 64 tokens" in said and "give a smaller --window" in said
    assert llmq(*given, "--window", 32).returncode == 0
