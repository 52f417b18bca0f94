"""The peaks of a run, counted by hand; hosts, devices, disks and folders that cannot hold it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from llmq import job
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning.memory import (
    TRANSIENT,
    Budget,
    Load,
    check_room,
    check_writable,
    hidden_width,
    predict,
)
from llmq.recipe.recipe import Recipe
from tests.llmq.planning.made import IDS, make
from tests.llmq.refusal import refused


def test_too_little_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    with pytest.raises(LlmqError, match="of memory and .* are free"):
        make(tiny_model)


def test_too_little_disk(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    refused(lambda: job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32)), ids=IDS, out=tmp_path / "o"), "on disk")


class Model(nn.Module):
    """An input embedding of 100 rows, a block of one matrix with a bias, a norm, an output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.block, self.norm = nn.Embedding(100, 8), nn.Linear(8, 30), nn.LayerNorm(8, bias=False)
        self.head = nn.Linear(8, 100, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.entry

    def get_output_embeddings(self) -> nn.Module:
        return self.head


INSIDE, OUTSIDE = ["block.weight", "block.bias"], ["entry.weight", "norm.weight"]
LOADS = [Load(1000, 100, 10, 1), Load(2000, 300, 20, 50_000)]


def peaks(device: str, dtype: torch.dtype = torch.float32, **more: int) -> Budget:
    return predict(Model(), INSIDE, OUTSIDE, dtype, (5, 7), 2, LOADS, 77, device, **more)


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> int:
    """What this process holds now, as long as the test runs."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1_000_000))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    return 1_000_000


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_peaks_of_a_host(dtype: torch.dtype, size: int, resident: int) -> None:
    """Three copies of every window's states; the worst block, whose workspace is more than a forward pass."""
    base = resident + TRANSIENT
    work = 2000 + 300 + 20 + 50_000
    for chains in (3, 4):
        made = peaks("cpu", dtype, chains=chains)
        assert made == Budget(base + chains * 5 * 7 * 8 * size + work, 0, 77)
    assert peaks("cpu", dtype) == peaks("cpu", dtype, chains=3)


def test_what_goes_between_blocks_counts_if_it_is_known(resident: int) -> None:
    more = peaks("cpu", between=1_000_000).memory - peaks("cpu", between=1_000).memory
    assert more == 3 * 5 * 999_000
    assert peaks("cpu", between=7 * 8 * 4) == peaks("cpu")


def test_a_forward_pass_counts_where_a_block_needs_less(resident: int) -> None:
    """Six copies of two windows at the widest matrix, 30; recording has the embedding and norm besides."""
    forward, embedding = 6 * 2 * 7 * 30 * 4, (100 * 8 + 8) * 4
    made = predict(Model(), INSIDE, OUTSIDE, torch.float32, (5, 7), 2, [Load(1000, 100, 10, 1)], 0, "cpu")
    more = max(1000 + 100 + 10 + forward, embedding + 1000 + forward)
    assert made.memory == resident + TRANSIENT + 3 * 5 * 7 * 8 * 4 + more


def test_the_peaks_of_a_device(resident: int) -> None:
    """The work is there; the host has the states, the largest block with its result, and what recording takes.

    States are page-locked memory: those of a batch of two windows take 512 bytes in place of 448.
    """
    forward, embedding = 6 * 2 * 7 * 30 * 4, (100 * 8 + 8) * 4
    states = 3 * (5 * 7 * 8 * 4 + 3 * (512 - 2 * 7 * 8 * 4))
    host = resident + TRANSIENT + states + (2000 + 300) + embedding + 1000 + forward
    assert peaks("cuda") == Budget(host, 2000 + 300 + 20 + 50_000, 77)


def test_the_width_of_hidden_states() -> None:
    assert hidden_width(Model()) == 8


def test_a_device_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1024, 4096))
    check_room(Budget(0, 1024, 0), None, "cuda:0")
    check_room(Budget(0, 2048, 0), None, "cpu")
    refused(lambda: check_room(Budget(0, 2048, 0), None, "cuda:0"), "2.0 KiB on cuda:0 and 1.0 KiB are free", "rtn")


def test_what_a_run_wrote_before_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    (tmp_path / "a.safetensors").write_bytes(bytes(24))
    (tmp_path / "a.other").write_bytes(bytes(500))
    check_room(Budget(0, 0, 1024), tmp_path, "cpu")
    refused(lambda: check_room(Budget(0, 0, 1025), tmp_path, "cpu"), str(tmp_path), "on disk")
    check_room(Budget(0, 0, 1025), None, "cpu")
    refused(lambda: check_room(Budget(0, 0, 1025), tmp_path / "new" / "er", "cpu"), "er: the result needs 1.0 KiB")


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "er")
    file = tmp_path / "file"
    file.touch()
    refused(lambda: check_writable(file / "out"), f"{file} is a file, not a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(lambda: check_writable(tmp_path / "new"), f"{tmp_path}: no permission to write there")
