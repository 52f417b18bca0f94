"""Copies of tensors in mapped files: equal, in memory of their own, and what was copied may leave the memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llmq.inference import own
from llmq.inference.own import leave
from llmq.machine import resident_memory

MIB = 1 << 20


def mapped(folder: Path, rows: int = 1000, width: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor, and the same in a mapped file."""
    values = torch.randn(rows, width)
    save_file({"weight": values}, folder / "m.safetensors")
    with safe_open(folder / "m.safetensors", "pt") as file:
        return values, file.get_tensor("weight")


@pytest.mark.parametrize("at_once", [1, 5000, 1 << 24])
def test_parameters_are_copied(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "AT_ONCE", at_once)
    values, tensor = mapped(tmp_path, rows=100)
    tied = nn.Parameter(tensor, requires_grad=False)
    model = nn.ModuleList([nn.Linear(1024, 100, bias=False), nn.Linear(1024, 100)])
    model[0].weight = model[1].weight = tied
    own.own(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, values) and model[0].weight.data_ptr() != tensor.data_ptr()
    assert torch.equal(tensor, values)


@pytest.mark.skipif(sys.platform != "linux", reason="a hint that Linux knows")
def test_what_was_read_may_leave_and_is_read_again(tmp_path: Path) -> None:
    values, tensor = mapped(tmp_path, rows=16 * 1024)
    assert torch.equal(tensor, values)
    before = resident_memory()
    leave([tensor])
    assert resident_memory() < before - 48 * MIB
    assert torch.equal(tensor, values)


def test_memory_that_no_file_holds_is_left_as_it_is() -> None:
    values = torch.randn(1000, 1000)
    copy = values.clone()
    leave([values, values[:10], values.t(), torch.empty(1000, 1000, device="meta")])
    assert torch.equal(values, copy)
