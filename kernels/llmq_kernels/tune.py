"""Measure launch configurations on this machine's GPU, and keep the fastest in the user's table.

`llmq_kernels.triton.rule` only estimates; this module measures. Each product is captured as a CUDA graph over several
copies of the weight, so that Python's overhead is excluded and the weight does not stay in the GPU's cache. The table
is written after each product, and its entries are not measured again, so a run can be stopped and resumed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq_kernels import planes
from llmq_kernels.backend import triton_refusal
from llmq_kernels.weights import PackedInt

if TYPE_CHECKING:
    from llmq_kernels.triton.config import Config
    from llmq_kernels.triton.gpu import Gpu

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BEYOND_CACHE = 1 << 28
WRONG = 2e-2
"""Results with a larger relative difference to the dense product are wrong; bfloat16's rounding gives about 3e-3."""


def tune(
    shapes: Sequence[tuple[int, int]],
    bits: Sequence[int] = (4,),
    group_sizes: Sequence[int] = (128,),
    rows: Sequence[int] = ROWS,
    device: str = "cuda",
    again: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, line: None,
) -> Path:
    """Measure every candidate for every shape [out, in], bit width, group size and number of rows; bfloat16 inputs.

    again: also repeat measurements that the table has. progress(done, total, line) is called after each product.
    Returns the table's path. Raises ValueError without a GPU, or for a weight that the Triton kernels do not support.
    """
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is not a device: give cuda, or cuda:1 …") from error
    if min((*group_sizes, *rows, *(size for shape in shapes for size in shape)), default=1) < 1:
        raise ValueError("shapes, groups and rows are at least 1")
    if where.type != "cuda" or not torch.cuda.is_available():
        raise ValueError("tuning needs a GPU, and torch finds none here")
    reason = triton_refusal(where)
    if reason is not None:
        raise ValueError(reason)
    from llmq_kernels.triton import tables
    from llmq_kernels.triton.gpu import gpu_of

    gpu = gpu_of(where)
    path = tables.user_table(gpu.name)
    measured: dict[str, Any] = {}
    if path.is_file():
        tables.read_table(path)
        measured = json.loads(path.read_text(encoding="utf-8"))["measured"]
    products = [(shape, b, g, m) for shape in shapes for b in bits for g in group_sizes for m in rows]
    for done, ((out, width), b, g, m) in enumerate(products, 1):
        name = tables.key(b, tables.bucket(m), out, width, g)
        if again or name not in measured:
            best, config = fastest(gpu, where, b, m, out, width, g)
            measured[name] = tables.entry(config, best)
            save(path, gpu.name, measured)
        config = measured[name]["config"]
        progress(done, len(products), f"{name}: {config['family']}, {measured[name]['microseconds']} µs")
    tables.table.cache_clear()
    return path


def fastest(
    gpu: Gpu, device: torch.device, bits: int, m: int, out: int, width: int, group_size: int
) -> tuple[float, Config]:
    """Microseconds and configuration of the fastest candidate whose results agree with the dense product.

    Warns of a candidate with wrong results. Raises ValueError for an unsupported weight.
    """
    reason = planes.refusal(device, torch.bfloat16, bits, out, width, group_size)
    if reason is not None:
        raise ValueError(f"[{out}, {width}] of {bits} bits in groups of {group_size}: {reason}")
    tiles = -(-width // planes.TILE[bits])
    groups = -(-width // group_size)
    words = tiles * planes.WORDS[bits]
    copies = max(1, min(64, -(-BEYOND_CACHE // (2 * out * words))))
    packed = [torch.randint(-32768, 32768, (out, words), dtype=torch.int16, device=device) for _ in range(copies)]
    scale = torch.full((groups, out), 0.01, dtype=torch.bfloat16, device=device)
    weights = [PackedInt(one, scale, None, bits, out, width, group_size) for one in packed]
    x = torch.randn(m, width, device=device).to(torch.bfloat16)
    expected = planes.dense(x, weights[0], None)
    times = []
    for config in candidates(gpu, bits, m, out, width, group_size):
        try:
            found = planes.run(x, weights[0], None, config, gpu.backend)
            apart = float((found - expected).float().norm() / expected.float().norm())
            if not apart < WRONG:
                warnings.warn(
                    f"skipped a configuration with wrong results on {gpu.name} (relative error {apart:.2g}): {config}",
                    stacklevel=2,
                )
                continue
            times.append((seconds(x, weights, config, gpu.backend) * 1e6, config))
        except (RuntimeError, ValueError, TypeError):  # too much shared memory, or a tile that triton cannot compile
            torch.cuda.synchronize(device)
    if not times:
        raise ValueError(f"no configuration for [{out}, {width}] of {bits} bits at {m} rows runs on {gpu.name}")
    return min(times, key=lambda pair: pair[0])


def candidates(gpu: Gpu, bits: int, m: int, out: int, width: int, group_size: int) -> Iterator[Config]:
    """The rule's choice, similar configurations of every family that supports m rows, and the dense product."""
    from llmq_kernels.triton.config import Config, power
    from llmq_kernels.triton.rule import rule

    tiles = -(-width // planes.TILE[bits])
    chosen = rule(gpu, bits, m, out, width, group_size)
    yield chosen
    if chosen.family != "dense":
        yield Config("dense")
    if m <= 4:
        for rows in (1, 2, 4, 8):
            for warps in (1, 2, 4, 8):
                yield Config("one_row", rows, power(m, 1), 8 * warps, warps=warps)
    splits = [programs for programs in (1, 2, 4, 8) if programs == 1 or 4 * programs <= tiles]
    if m <= 64:
        block_m = min(32, power(m, 8))
        for rows in (16, 32, 64):
            for warps in (2, 4, 8):
                for stages in (2, 3, 4):
                    for programs_k in splits[:3]:
                        if rows * block_m <= 1024 and warps <= tiles:
                            yield Config("few_rows", rows, block_m, 1, programs_k, warps, stages)
    if 16 <= m <= 1024:
        for block_m in {min(power(m, 16), size) for size in (32, 64, 128)}:
            for rows, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
                for stages in (2, 3, 4):
                    for programs_k in splits if m <= 128 else splits[:1]:
                        for prescale in (False, True) if group_size < width else (False,):
                            yield Config("many_rows", rows, block_m, 1, programs_k, warps, stages, prescale)


def seconds(x: Tensor, weights: list[PackedInt], config: Config, backend: str) -> float:
    """Seconds per product: the median over replays of a graph with one product per copy of the weight."""

    def once(weight: PackedInt) -> Tensor:
        return planes.run(x, weight, None, config, backend)

    with torch.cuda.device(x.device):
        once(weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights:
                once(weight)
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return float(sorted(times)[len(times) // 2]) / 1e3 / len(weights)


def save(path: Path, gpu: str, measured: dict[str, object]) -> None:
    """Replace the whole table atomically."""
    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "measured": measured}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
