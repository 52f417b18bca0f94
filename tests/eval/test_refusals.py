"""What `llmq eval` refuses before it measures anything, in words that say the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Run
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
