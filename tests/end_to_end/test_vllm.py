"""Folders in real vLLM, on the CPU: `scripts/check_vllm.py` has every scheme, and docs/vllm.md its results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
SECONDS = 180
CASES = ("demo 4-bit g64 symmetric", "demo 4-bit and 4-bit channel")


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    """The python of an environment with vLLM: $LLMQ_VLLM_PYTHON, or one that is made once in ~/.cache/llmq/vllm."""
    if os.environ.get("LLMQ_VLLM_PYTHON"):
        return Path(os.environ["LLMQ_VLLM_PYTHON"])
    folder = Path.home() / ".cache" / "llmq" / "vllm"
    code = f"import pathlib, vllm_environment as e; e.environment(pathlib.Path({str(folder)!r}), {SECONDS})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPTS)
    if done.returncode:
        pytest.skip(f"vLLM's environment cannot be made here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


@pytest.mark.slow(60)
@pytest.mark.timeout(SECONDS + 300)
def test_vllm_reads_what_llmq_writes(vllm_python: Path, tmp_path: Path) -> None:
    """One scheme by class, and two by name, fused parts included; log-probabilities within 0.003 (rms)."""
    command = [sys.executable, "check_vllm.py", "--vllm", str(vllm_python), "--cache", str(tmp_path / "rows.json")]
    done = subprocess.run([*command, "--only", *CASES], capture_output=True, text=True, cwd=SCRIPTS)
    assert done.returncode == 0 and "2 cases, 0 wrong" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("rms 0.00") == 2, done.stdout


@pytest.mark.slow(60)
@pytest.mark.timeout(SECONDS + 300)
def test_vllm_reads_pictures_with_a_tower_that_it_names_otherwise(vllm_python: Path, tmp_path: Path) -> None:
    """Of this type vLLM asks for names of the tower that no list of ours has."""
    command = [sys.executable, "check_vllm.py", "--vllm", str(vllm_python), "--cache", str(tmp_path / "rows.json")]
    done = subprocess.run([*command, "--only", "llava_onevision 4*"], capture_output=True, text=True, cwd=SCRIPTS)
    if "CalledProcessError" in done.stderr and "torchvision" in done.stderr:
        pytest.skip("torchvision, which vLLM needs for pictures, cannot be installed here")
    assert done.returncode == 0 and "1 cases, 0 wrong" in done.stdout, done.stdout + done.stderr
    assert "with a picture 0.00" in done.stdout, done.stdout
