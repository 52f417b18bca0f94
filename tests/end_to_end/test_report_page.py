"""report.html as a run writes it: what it says to do again, done again, gives the same bytes."""

from __future__ import annotations

import re
import shlex
from html import unescape
from pathlib import Path

import pytest

from llmq.report.card import hub_id
from tests.conftest import Run
from tests.end_to_end.test_resume import digests
from tests.llmq.report.page.reports import Page


@pytest.mark.slow
def test_do_it_again(
    tmp_path: Path, tiny_model: Path, text_file: Path, llmq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "first one"
    options = ["--method", "awq+gptq", "--bits", "3", "--group-size", "32", "--samples", "4", "--seqlen", "64"]
    options += ["--keep", "layers.1.mlp", "--calib", text_file, "--tp", "2"]
    done = llmq("quantize", tiny_model, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    html = (out / "report.html").read_text()
    page = Page(html)
    assert "kept by --keep" in page.text and len(page.plots) == 7 + 3
    command, recipe = map(unescape, re.findall(r"<pre tabindex=.0.><code>(.*?)</code>", html, re.DOTALL))
    words = shlex.split(command)
    assert words[:2] == ["llmq", "quantize"] and "--tp" in words and str(out) in words
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe)
    words[words.index(str(out))] = str(tmp_path / "again")
    done = llmq(*words[1:])
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "again") == digests(out)
    assert hub_id(str(tiny_model)) is None and "base_model" not in (out / "README.md").read_text()
