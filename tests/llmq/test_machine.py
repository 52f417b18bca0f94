"""What this machine has: memory as the system counts it, devices, packages, sizes in words."""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from llmq import machine
from llmq.grids.ranges import find_range
from llmq.grids.scheme import Scheme
from llmq.machine import (
    by_rows,
    check_device,
    device_memory,
    existing,
    give_back,
    peak_memory,
    require,
    resident_memory,
    size,
)
from tests.llmq.refusal import refused

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 1, "1024.0 KiB"),
        (MIB, "1.0 MiB"),
        (1.5 * 1024 * MIB, "1.50 GiB"),
        (2048 * 1024 * MIB, "2048.00 GiB"),
    ],
)
def test_a_size_in_words(nbytes: float, words: str) -> None:
    assert size(nbytes) == words


def test_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert existing(tmp_path) == tmp_path == existing(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    assert existing(Path("a")) == tmp_path and existing(Path("/none/at/all")) == Path("/")


def test_a_device_that_is_not_there_is_named() -> None:
    check_device("cpu")
    for wrong in ("nonsense", "cuda:99"):
        refused(lambda wrong=wrong: check_device(wrong), f"--device {wrong}: not usable here", "--device cpu always is")


def test_a_missing_package_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("json", "anything").loads("1") == 1
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(lambda: require("peft", "fine-tuning"), "fine-tuning needs peft: pip install peft")


def test_what_bitsandbytes_says_by_itself_is_not_heard() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    require("json", "anything")
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_resident_memory_is_what_the_system_counts() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert resident_memory() == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), abs=8 * MIB)


def test_the_peak_holds_what_was_there_for_a_moment() -> None:
    before = resident_memory()
    block = torch.ones(48 * MIB // 4)
    del block
    give_back()
    assert peak_memory() >= before + 40 * MIB and peak_memory() >= resident_memory()


def test_without_proc_the_peak_is_getrusage_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """In kilobytes but on macOS, where it is bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(machine, "Path", lambda _: Path("/none"))
    for platform, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory() == pytest.approx(most * unit, rel=0.2)


def test_the_host_has_no_device_memory() -> None:
    assert device_memory(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_most_on_a_gpu_since_the_last_call() -> None:
    device = torch.device("cuda")
    device_memory(device)
    block = torch.ones(MIB, device=device)
    del block
    first, second = device_memory(device), device_memory(device)
    assert first is not None and second is not None and first >= 4 * MIB > second


def test_a_system_without_malloc_trim_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> object:
        raise OSError

    monkeypatch.setattr(machine.ctypes, "CDLL", none)
    give_back()


def test_threads_have_the_modes_of_the_caller() -> None:
    """In inference mode, tensors may be written by those in inference mode alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            out = torch.zeros(8)

            def work(some: slice) -> bool:
                out[some] = 1
                return torch.is_grad_enabled()

            assert by_rows(8, 2, work, torch.device("cpu")) == [False] * 4 and bool(out.all())
            assert find_range(torch.ones(4, 1 << 17), Scheme(4, 128), "mse")[0].shape == (4, 1 << 10)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("nbytes", "taken"), [(0, 0), (1, 1), (448, 512), (1 << 24, 1 << 24), ((1 << 24) + 1, 1 << 25)]
)
def test_page_locked_memory_is_rounded_up(nbytes: int, taken: int) -> None:
    assert machine.locked_bytes(nbytes) == taken


def test_where_no_memory_can_be_locked_there_is_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU none can; with one, there may be no more of it."""
    empty, asked = torch.empty, []

    def full(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", full)
    found = machine.page_locked((2, 3), torch.bfloat16)
    assert asked == [True, False] and found.shape == (2, 3) and found.dtype == torch.bfloat16 and not found.is_cuda


def test_what_is_on_the_host_stays_there() -> None:
    x = torch.randn(3)
    assert machine.to_host(x) is x and machine.to_device(x, torch.device("cpu")) is x
    assert machine.to_device(x, torch.device("meta")).is_meta
