"""Folders in real vLLM, on the CPU: `scripts/check_vllm.py` has every scheme, and docs/vllm.md its results."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
SECONDS = 180
CASES = ("demo 4-bit g64 symmetric", "demo 4-bit and 4-bit channel")
PICTURES = "llava_onevision 4*"


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


@pytest.fixture(scope="module")
def printed(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the script says of each case; one vLLM runs them all, which takes long to start."""
    command = [sys.executable, "check_vllm.py", "--vllm", str(vllm_python)]
    for cases in ((*CASES, PICTURES), CASES):
        rows = tmp_path_factory.mktemp("vllm") / "rows.json"
        words = [*command, "--cache", str(rows), "--only", *cases]
        done = subprocess.run(words, capture_output=True, text=True, cwd=SCRIPTS)
        if "CalledProcessError" not in done.stderr or "torchvision" not in done.stderr:
            break
    assert done.returncode == 0 and f"{len(cases)} cases, 0 wrong" in done.stdout, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return {case: line for case in cases for line in lines if fnmatch(line, f"ok   {case} *")}


@pytest.mark.slow(90)
@pytest.mark.timeout(SECONDS + 300)
def test_vllm_reads_what_llmq_writes(printed: dict[str, str]) -> None:
    """One scheme by class, and two by name, fused parts included; log-probabilities within 0.003 (rms)."""
    assert all("rms 0.00" in printed[case] for case in CASES), printed


@pytest.mark.slow(90)
@pytest.mark.timeout(SECONDS + 300)
def test_vllm_reads_pictures_with_a_tower_that_it_names_otherwise(printed: dict[str, str]) -> None:
    """Of this type vLLM asks for names of the tower that no list of ours has."""
    if PICTURES not in printed:
        pytest.skip("torchvision, which vLLM needs for pictures, cannot be installed here")
    assert "with a picture 0.00" in printed[PICTURES], printed
