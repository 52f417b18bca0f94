"""Several threads that load at the same time."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import llmq
from llmq.inference.pretrained import load_model
from tests.llmq.inference.test_transformers_hook import layers
from tests.llmq.written import Case, tiny, write


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a load changes in the process is changed for no other load, and is as it was afterwards."""
    write(tmp_path / "packed", Case("gptq"))
    tiny().save_pretrained(tmp_path / "plain")
    tables = [dict(table) for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)]
    process = (sys.stderr, logging.getLogger("llmq").handlers, logging.getLogger("llmq").propagate)
    real = AutoModelForCausalLM.from_pretrained
    meeting = threading.Barrier(2, timeout=0.5)
    met, failed, models = [], [], []

    def from_pretrained(folder: Path, **options: Any) -> Any:
        try:
            meeting.wait()
            met.append(folder)
        except threading.BrokenBarrierError:
            pass
        return real(folder, **options)

    def load(folder: Path, kernels: bool) -> None:
        try:
            models.append(load_model(folder, probe=False, kernels=kernels))
        except llmq.LlmqError as error:
            failed.append(error)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    arguments = [(tmp_path / "packed", True), (tmp_path / "packed", True), (tmp_path / "plain", False)]
    threads = [threading.Thread(target=load, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met
    assert not failed
    assert sorted(len(layers(model)) for model in models) == [0, 14, 14]
    assert [dict(table) for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)] == tables
    assert (sys.stderr, logging.getLogger("llmq").handlers, logging.getLogger("llmq").propagate) == process
