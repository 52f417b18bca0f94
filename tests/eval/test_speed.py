"""Speed and memory: measured in a process of their own, whose failures come back as a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest

from llmq.errors import LlmqError
from llmq_eval import measures, speed


@pytest.mark.slow
def test_numbers_of_a_process_of_its_own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes no module of the user's folder."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('mine')")
    monkeypatch.chdir(tmp_path)
    ballast = bytearray(1 << 30)
    ballast[:: 1 << 12] = b"x" * (1 << 18)
    found = speed.measure(tiny_model, dtype="float32", repeats=6, prompt=16, tokens=4)
    assert found.peak < 1 << 30 < psutil.Process().memory_info().rss
    assert 0 < found.before < found.resident <= found.peak and found.device is None
    assert len(found.prefill) == len(found.decode) == len(found.load_seconds) == 6
    assert min(found.prefill + found.decode + found.load_seconds) > 0
    assert (found.prompt, found.tokens, found.dtype) == (16, 4, "float32")
    shown = {one.metric: one for kind in ("speed", "memory") for one in measures.speed(kind, found, "a processor")}
    assert all("float32, a processor, " in one.protocol for one in shown.values())
    load = shown["load_seconds"]
    assert load.low == min(found.load_seconds) and load.high == max(found.load_seconds)
    decode = shown["decode_tokens_per_second"]
    assert decode.low == min(found.decode) and decode.high == max(found.decode)
    assert sorted(found.decode)[2] <= decode.value <= sorted(found.decode)[3]
    assert set(shown) >= {"load_seconds", "prefill_tokens_per_second", "resident_bytes", "peak_bytes"}
    del ballast


@pytest.mark.slow
def test_failures_are_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "homegrown"}}))
    with pytest.raises(LlmqError, match="'homegrown'.*random weights"):
        speed.measure(folder)
