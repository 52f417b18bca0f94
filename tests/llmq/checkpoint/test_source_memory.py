"""Source: reading a tensor costs its bytes, and nothing is mapped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.llmq.checkpoint.made import one

RSS = """
import resource, sys, torch
from pathlib import Path
from llmq.checkpoint.source import FolderSource, check_finite

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) // 1024

source = FolderSource(Path(sys.argv[1]))
check_finite(source.read("w0")[:8], "warm")
before = resident("VmRSS")
for name in source.names():
    check_finite(source.read(name), name)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_costs_one_tensor_and_maps_nothing(tmp_path: Path) -> None:
    mib = 1 << 20
    folder = one(tmp_path / "m", {f"w{i}": torch.ones(16 * mib // 2, dtype=torch.bfloat16) for i in range(12)})
    output = subprocess.run(
        [sys.executable, "-c", RSS, str(folder)], capture_output=True, text=True, check=True, env={**os.environ}
    ).stdout
    assert int(output) < 48, "MiB above the start, for 12 tensors of 16 MiB"
