"""What `llmq eval` refuses before it measures anything, in words that say the way out."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Run
from tests.llmq.page.reports import report


def test_folders_of_different_bases(tmp_path: Path, llmq: Run) -> None:
    from llmq.report import REPORT

    for name, base in {"a": "org/x", "b": "org/y"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / REPORT).write_text(report(2, model=base).to_json())
    done = llmq("eval", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "these folders have different bases" in said
    assert f"{tmp_path / 'a'}: org/x; {tmp_path / 'b'}: org/y" in said and "give --base" in said
