"""What bench_kernels.py and gpu_check.py record beside times on a GPU: clocks, the chosen kernel, host microseconds."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import compile_kernels
import torch
from torch import Tensor

CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
HOST_CALLS = 50


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now; empty where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, (part.strip() for part in told.splitlines()[0].split(",")), strict=False))


def chosen(shape: tuple[int, int], rows: int, kind: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The configuration of an integer product, with the registers and shared memory of its kernel. kind: bits,
    group_size, asymmetric and dtype, as bench_kernels.py's settings. Empty without a GPU.
    """
    if device.type != "cuda":
        return {}
    from llmq_kernels.triton import compile as compiling
    from llmq_kernels.triton import tables
    from llmq_kernels.triton.gpu import gpu_of
    from llmq_kernels.triton.variants import product

    gpu, dtype = gpu_of(device), getattr(torch, kind["dtype"])
    sizes = kind["bits"], rows, *shape, kind["group_size"] or shape[1]
    config = tables.choose(gpu, *sizes, kind["asymmetric"], dtype)
    if config.family == "dense":
        return {"config": asdict(config)}
    made = compiling.warm(product(config, *sizes, kind["asymmetric"], dtype, gpu.backend))
    nvidia = gpu.backend == "cuda"
    used = compile_kernels.nvidia(made.asm["cubin"]) if nvidia else compile_kernels.amd(made.asm["amdgcn"])
    return {"config": asdict(config), "registers": used["registers"], "shared": made.metadata.shared}


def warm(shapes: Iterable[tuple[int, int]], rows: Iterable[int], kind: dict[str, Any], device: torch.device) -> int:
    """Compile what the products of all shapes and rows will launch, all at once; returns how many cannot be."""
    if device.type != "cuda":
        return 0
    import os

    from llmq_kernels import tune
    from llmq_kernels.triton import tables
    from llmq_kernels.triton.gpu import gpu_of

    gpu, dtype, wanted = gpu_of(device), getattr(torch, kind["dtype"]), []
    for shape in shapes:
        for m in rows:
            sizes = kind["bits"], m, *shape, kind["group_size"] or shape[1]
            config = tables.choose(gpu, *sizes, kind["asymmetric"], dtype)
            if config.family != "dense":
                wanted.append((config, *sizes, kind["asymmetric"], kind["dtype"]))
    return tune.compile_all(wanted, gpu, max(1, (os.cpu_count() or 2) - 2)) if wanted else 0


def host_microseconds(call: Callable[[Tensor], Any], x: Tensor) -> float:
    """Processor time of this thread for a call that only queues work, the least of three means."""
    found = []
    for _ in range(3):
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        began = time.thread_time()
        for _ in range(HOST_CALLS):
            call(x)
        found.append((time.thread_time() - began) / HOST_CALLS)
    return 1e6 * min(found)
