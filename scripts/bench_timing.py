"""Timing for bench_kernels.py: interleaved medians, weights rotated beyond the cache size, a CUDA graph on a GPU."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_operators import Operator
from torch import Tensor

GRAPH_SECONDS = 1e-3
"""The minimum seconds of work in a graph, so that its launch is negligible."""
GRAPH_CALLS = 512
COPIES = 128
"""The maximum number of copies; shapes for which this does not fill the cache do not occur in models."""


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: L2 of a GPU; the largest of a CPU, or 32 MiB if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [1 << 25]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM])", file.read_text().strip()):
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes[1:] or sizes)


def copies_needed(size: int, cache: int) -> int:
    """The number of copies of a weight of `size` bytes in twice the cache, so that the next copy is never cached."""
    return max(2, min(COPIES, -(-2 * cache // max(size, 1))))


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes per second, read plus written, of a large copy: the median of many."""
    size = 1 << 30 if device.type == "cuda" else 8 * cache_bytes(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = measure({"copy": lap([target.copy_], source)}, seconds)["copy"]
    return 2 * size / statistics.median(times)


def once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(laps: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call, several times each, with the operators in turns.

    laps: name → the operator's function from `lap`. There are 3 to 50 turns, and none starts after `seconds`; an
    operator that would take all the time has one turn.
    """
    times: dict[str, list[float]] = {name: [] for name in laps}
    began = time.perf_counter()
    for turn in range(50):
        for name, timed in laps.items():
            if turn == 0 or times[name][0] < seconds:
                times[name].append(timed())
        if turn >= 2 and time.perf_counter() - began > seconds:
            break
    return times


def lap(copies: Sequence[Operator], x: Tensor) -> Callable[[], float]:
    """A function that returns the seconds per call of an operator that was run (and so compiled) before.

    copies: the operator on copies of its weight, used in turns. On a GPU, the time is the mean over a CUDA graph of
    many calls, without Python and launch overhead. Raises RuntimeError if the operator cannot be captured.
    """
    if x.device.type == "cuda":
        return _graph_lap(copies, x)
    turns = cycle(copies)

    def timed() -> float:
        run = next(turns)
        began = time.perf_counter()
        run(x)
        return time.perf_counter() - began

    return timed


def _graph_lap(copies: Sequence[Operator], x: Tensor) -> Callable[[], float]:
    """`lap` on a GPU, with so many rounds over the copies that the graph's own launch is negligible."""
    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        for run in copies:
            run(x)
    torch.cuda.current_stream(x.device).wait_stream(side)
    timed = _captured(copies, x, 1)
    rounds = min(round(GRAPH_SECONDS / timed()), GRAPH_CALLS) // len(copies)
    return _captured(copies, x, rounds) if rounds > 1 else timed


def _captured(copies: Sequence[Operator], x: Tensor, rounds: int) -> Callable[[], float]:
    """Capture some rounds over the copies as a CUDA graph, run once; returns a function for the seconds per call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in copies:
                run(x)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed() -> float:
        torch.cuda.synchronize(x.device)
        # The GPU first sleeps until everything is queued; otherwise the graph's launch would be timed too.
        torch.cuda._sleep(1_000_000)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000 / (rounds * len(copies))

    timed()
    return timed


def busy(device: torch.device) -> str:
    """A warning if other processes use the CPU; call it before starting any work."""
    if device.type == "cuda":
        return ""
    load = psutil.cpu_percent(interval=1) / 100 * (os.cpu_count() or 1)
    if load < 0.2:
        return ""
    return f"other processes kept {load:.1f} of {os.cpu_count()} processors busy before this run: times are unsteady"


def machine(device: torch.device) -> dict[str, Any]:
    """The context of a measurement: the device, the versions, the commit."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
    )
    versions = {}
    for name in ("torch", "triton", "transformers", "bitsandbytes", "gemlite"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about = {"device": found.name, "capability": f"{found.major}.{found.minor}", "cuda": torch.version.cuda}
    else:
        about = {"device": _processor(), "capability": torch.backends.cpu.get_cpu_capability()}
        about["threads"] = torch.get_num_threads()
    return about | {"cache": cache_bytes(device), "versions": versions, "commit": commit.stdout.strip() or "unknown"}


def _processor() -> str:
    """The name of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else "CPU"
