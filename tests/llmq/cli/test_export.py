"""`llmq export`: what it says, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.llmq.export import fake_converter


@pytest.fixture
def folder(llmq: Run, tiny_model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "changed"
    done = llmq(
        "quantize", tiny_model, "-o", out, "--method", "rtn", "--group-size", 32, "--samples", 1, "--seqlen", 32
    )
    assert done.returncode == 0, done.stderr
    return out


def test_gguf(llmq: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp, out = tmp_path / "cpp", tmp_path / "model.gguf"
    cpp.mkdir()
    shutil.copy(fake_converter.__file__, cpp / "convert_hf_to_gguf.py")
    done = llmq("export", folder, "--to", "gguf", "-o", out, "--llama-cpp", cpp, "--embedding", "q8_0")
    assert done.returncode == 0, done.stderr
    # The model is in float32, and so are its scales.
    assert "Q4_0" in done.stdout and "differs by at most" in done.stdout and "rounded to Q8_0" in done.stdout
    assert "warning: the converter leaves out, or computes with, model.layers.0.self_attn.v_proj.weight" in done.stdout
    assert "read back and compared with the dequantized weights" in done.stdout and out.exists()
    monkeypatch.delenv("LLMQ_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for given, told in (
        (("--to", "tar", "-o", out), "--to tar: choose from gguf, mlx, gptq, awq"),
        (("--to", "gguf", "-o", out), "--to gguf needs llama.cpp's converter"),
        (("--to", "gguf", "-o", out, "--embedding", "q4"), "--embedding 'q4' is not known: choose from keep, q8_0"),
    ):
        done = llmq("export", folder, *given)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_folders(llmq: Run, folder: Path, tmp_path: Path) -> None:
    done = llmq("export", folder, "--to", "mlx", "-o", tmp_path / "mlx")
    assert done.returncode == 0, done.stderr
    assert "21 weights with group_size 32 bits 4 mode affine" in done.stdout and "every number as in" in done.stdout
    assert "2 not quantized in the folder: lm_head.weight, model.embed_tokens.weight" in done.stdout
    done = llmq("export", folder, "--to", "awq", "-o", tmp_path / "awq", "--prefer", "q8_0")
    assert done.returncode == 2 and "--prefer: only for --to gguf" in done.stderr
