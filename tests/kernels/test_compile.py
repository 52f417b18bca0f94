"""The kernels compile for GPUs that are not here, none keeps anything in memory of its own, and loads are wide.

In a process of its own: triton imported with TRITON_INTERPRET set compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow(25)
def test_a_sample_of_every_kernel(tmp_path: Path) -> None:
    """Those of 4 bits on every target; scripts/compile_kernels.py itself does all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    script, found = ROOT / "scripts" / "compile_kernels.py", tmp_path / "found.jsonl"
    match = r" 4 bits group 128 (bf16 )?zero|^nf4 (one|many)_rows?|^int8 product"
    command = [sys.executable, str(script), "--sample", "--match", match, "--keep", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    targets = {row["target"] for row in rows}
    assert targets == {"cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942"}
    for row in rows:
        if row["target"].startswith("cuda:") and row["kernel"] in ("one_row", "few_rows", "many_rows"):
            # What is narrower are scales and zero points, and the bias.
            assert row["wide"] > row["narrow"], row
            assert row["converts"] <= 8, row  # of zero points, none of codes
