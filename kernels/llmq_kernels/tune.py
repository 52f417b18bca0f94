"""Measure launch configurations on this machine's GPU, and keep the fastest in the user's table.

`llmq_kernels.triton.rule` only estimates; this module measures. Each product is captured as a CUDA graph over several
copies of the weight, so that Python's overhead is excluded and the weight does not stay in the GPU's cache. The table
is written after each product, and its entries are not measured again, so a run can be stopped and resumed.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmq_kernels.backend import triton_refusal
from llmq_kernels.codebook_linear.codebooks import tables_of
from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int_linear import planes
from llmq_kernels.triton.config import PLAIN, Config, Family, Kind, power, run_length
from llmq_kernels.weights import PackedInt

if TYPE_CHECKING:
    from llmq_kernels.triton.gpu import Gpu

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ROUTED, PAIRS = (16, 64, 256, 1024, 4096), (2, 4, 8, 16, 32, 64)
"""Rows of x that are routed to experts: sorted, and in pairs."""
BEYOND_CACHE = 1 << 28
WRONG = 2e-2
"""Results with a larger relative difference to the dense product are wrong; bfloat16's rounding gives about 3e-3."""


def tune(
    shapes: Sequence[tuple[int, int]],
    bits: Sequence[int] = (4,),
    group_sizes: Sequence[int] = (128,),
    rows: Sequence[int] | None = None,
    device: str = "cuda",
    again: bool = False,
    zeros: bool = False,
    dtype: str = "bfloat16",
    progress: Callable[[int, int, str], None] = lambda done, total, line: None,
    kind: Kind = PLAIN,
) -> Path:
    """Measure every candidate for every shape [out, in], bit width, group size and number of rows.

    kind: of weights of codebooks, which have 4 bits, and of stacked experts, which share the rows. A codebook
    for each row has no groups. rows: None for ROWS, ROUTED or PAIRS.

    Candidates of one shape are first compiled together, by as many processes as there are processors. again: also
    repeat measurements that the table has; zeros: of weights with zero points; dtype: of the inputs, bfloat16 or
    float16. progress(done, total, line) is called after each product.
    Returns the table's path. Raises ValueError without a GPU, or for a weight that the Triton kernels do not support.
    """
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is not a device: give cuda, or cuda:1 …") from error
    rows = rows or (PAIRS if kind.pairs else ROUTED if kind.experts else ROWS)
    if kind.codebook and (set(bits) != {4} or zeros):
        raise ValueError("codes of a codebook have 4 bits and no zero points")
    if min((*group_sizes, *rows, *(size for shape in shapes for size in shape)), default=1) < 1:
        raise ValueError("shapes, groups and rows are at least 1")
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"inputs are bfloat16 or float16, not {dtype!r}")
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
    floats = getattr(torch, dtype)
    groups = {shape: (shape[1],) if kind.codebook == "rows" else group_sizes for shape in shapes}
    products = [(shape, b, g, m) for shape in shapes for b in bits for g in groups[shape] for m in rows]
    for (_, width), b, g, m in products:
        if why := planes.unsupported(floats, b, width, g):
            raise ValueError(why)
        if not tables.bucket(m, kind):
            raise ValueError(f"{m} rows: tables end at {tables.BUCKETS[-1]}, above which the dense product is taken")
    named = [
        (one, tables.key(one[1], tables.bucket(one[3], kind), *one[0], one[2], zeros, floats, kind)) for one in products
    ]
    compile_all(
        (
            (config, b, m, *shape, g, zeros, dtype, kind)
            for (shape, b, g, m), name in named
            if again or name not in measured
            for config in candidates(gpu, b, m, *shape, g, kind)
            if config.family != "dense"
        ),
        gpu,
        os.cpu_count() or 1,
    )
    for done, (((out, width), b, g, m), name) in enumerate(named, 1):
        if again or name not in measured:
            best, config = fastest(gpu, where, b, m, out, width, g, zeros, floats, kind)
            measured[name] = tables.entry(config, best)
            save(path, gpu.name, measured)
        config = measured[name]["config"]
        progress(done, len(named), f"{name}: {config['family']}, {measured[name]['microseconds']} µs")
    tables.table.cache_clear()
    planes.forget()
    return path


def kind_of(codebook: str, experts: int, pairs: bool) -> Kind:
    """See `Kind`. Raises ValueError if there is none such."""
    if codebook not in ("", "all", "rows"):
        raise ValueError(f"a codebook is of all or rows, not of {codebook!r}")
    if experts < 0 or pairs and not experts:
        raise ValueError(f"{experts} experts{': pairs are of tokens and experts' if pairs else ''}")
    return Kind(cast(Any, codebook), experts, pairs)


def fastest(
    gpu: Gpu,
    device: torch.device,
    bits: int,
    m: int,
    out: int,
    width: int,
    group_size: int,
    zeros: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    kind: Kind = PLAIN,
) -> tuple[float, Config]:
    """Microseconds and configuration of the fastest candidate whose results agree with the dense product.

    Warns of a candidate with wrong results. Raises ValueError for an unsupported weight.
    """
    times = measure(gpu, device, bits, m, out, width, group_size, zeros, dtype, kind)
    if not times:
        raise ValueError(f"no configuration for [{out}, {width}] of {bits} bits at {m} rows runs on {gpu.name}")
    return min(times, key=lambda pair: pair[0])


def measure(
    gpu: Gpu,
    device: torch.device,
    bits: int,
    m: int,
    out: int,
    width: int,
    group_size: int,
    zeros: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    kind: Kind = PLAIN,
) -> list[tuple[float, Config]]:
    """Microseconds and configuration of every candidate that runs and is right; else as `fastest`."""
    from triton.errors import TritonError

    reason = planes.refusal(device, dtype, bits, out, width, group_size)
    if reason is not None:
        raise ValueError(f"[{out}, {width}] of {bits} bits in groups of {group_size}: {reason}")
    weights = _weights(device, bits, out, width, group_size, zeros, dtype, kind)
    x = torch.randn(m, width, device=device).to(dtype)
    routing = _routing(device, m, kind)
    expected = planes.dense(x, weights[0], None, routing)
    times = []
    for config in candidates(gpu, bits, m, out, width, group_size, kind):
        try:
            found = planes.run(x, weights[0], None, config, gpu.backend, routing)
            apart = float((found - expected).float().norm() / expected.float().norm())
            if not apart < WRONG:
                warnings.warn(
                    f"skipped a configuration with wrong results on {gpu.name} (relative error {apart:.2g}): {config}",
                    stacklevel=2,
                )
                continue
            times.append((seconds(x, weights, config, gpu.backend, routing) * 1e6, config))
        except (TritonError, RuntimeError, ValueError, TypeError):  # it does not fit, or triton cannot compile it
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return times


def _weights(
    device: torch.device, bits: int, out: int, width: int, group_size: int, zeros: bool, dtype: torch.dtype, kind: Kind
) -> list[PackedInt]:
    """Random weights of a kind, as many as a GPU's cache does not hold, with the same scales."""
    stack = (kind.experts,) if kind.experts else ()
    words, groups = -(-width // planes.TILE[bits]) * planes.WORDS[bits], -(-width // group_size)
    copies = max(1, min(64, -(-BEYOND_CACHE // (2 * out * words * max(1, kind.experts)))))
    scale = torch.full((*stack, groups, out), 0.01, dtype=torch.float32 if kind.codebook else dtype, device=device)
    zero = torch.ones((*stack, groups, out), dtype=torch.int8, device=device) if zeros else None
    codebook = tables = None
    if kind.codebook:
        entries = torch.linspace(-1, 1, 16, device=device).expand(out if kind.codebook == "rows" else 1, 16)
        one = tables_of(entries)
        codebook, tables = entries.expand(*stack, -1, -1).contiguous(), one.expand(*stack, -1, -1, -1).contiguous()
    sizes = bits, out, width, group_size
    return [
        PackedInt(
            torch.randint(-32768, 32768, (*stack, out, words), dtype=torch.int16, device=device),
            scale, zero, *sizes, codebook, tables,
        )
        for _ in range(copies)
    ]  # fmt: skip


def _routing(device: torch.device, m: int, kind: Kind) -> Routing | None:
    """m rows, spread evenly over the experts; None if there are none."""
    if not kind.experts:
        return None
    if kind.pairs:
        return Routing(chosen=(torch.arange(m, device=device) * 7 % kind.experts).unsqueeze(1))
    ends = torch.arange(1, kind.experts + 1, device=device) * m // kind.experts
    return Routing(ends.to(torch.int32))


# By rows of x, up to that many: family, rows of the weight and of x in a program, warps, programs that share K. What is
# compiled for one number of rows mostly serves the next.
SHAPED: dict[int, tuple[tuple[Family, int, int, int, int], ...]] = {
    8: (
        ("few_rows", 64, 8, 8, 1),
        ("few_rows", 32, 8, 8, 1),
        ("few_rows", 32, 8, 4, 1),
        ("few_rows", 16, 8, 8, 1),
        ("few_rows", 64, 8, 4, 4),
        ("few_rows", 32, 8, 8, 2),
    ),
    16: (
        ("few_rows", 64, 16, 8, 1),
        ("few_rows", 32, 16, 8, 1),
        ("few_rows", 64, 16, 4, 2),
        ("many_rows", 128, 16, 8, 2),
        ("many_rows", 64, 16, 4, 2),
    ),
    32: (
        ("few_rows", 32, 32, 8, 1),
        ("many_rows", 128, 32, 8, 1),
        ("many_rows", 128, 32, 8, 2),
        ("many_rows", 128, 32, 8, 4),
        ("many_rows", 64, 32, 4, 2),
        ("many_rows", 64, 32, 4, 4),
    ),
    64: (
        ("many_rows", 128, 64, 8, 1),
        ("many_rows", 128, 64, 8, 2),
        ("many_rows", 128, 64, 8, 4),
        ("many_rows", 64, 64, 4, 2),
        ("many_rows", 256, 64, 8, 4),
    ),
    1024: (
        ("many_rows", 128, 128, 8, 1),
        ("many_rows", 128, 128, 8, 2),
        ("many_rows", 128, 64, 8, 1),
        ("many_rows", 256, 64, 8, 1),
        ("many_rows", 256, 64, 8, 2),
    ),
}


def candidates(gpu: Gpu, bits: int, m: int, out: int, width: int, group_size: int, kind: Kind = PLAIN) -> list[Config]:
    """The rule's choice, the same without programmatic launch, the dense product, and a handful for so many rows.

    Of experts, for as many rows as one has, if they are spread evenly; programs do not share K.
    """
    from llmq_kernels.triton.tables import ruled

    tiles = -(-width // planes.TILE[bits])
    chosen = ruled(gpu, bits, m, out, width, group_size, kind)
    found = [chosen, replace(chosen, pdl=False), Config("dense")]
    rows = 1 if kind.pairs else -(-m // min(m, kind.experts)) if kind.experts else m
    if rows <= 4 and (kind.pairs or not kind.experts):
        found += [Config("one_row", count, power(rows, 1), 8 * 4, warps=4, pdl=gpu.pdl) for count in (2, 4)]
    # Experts that have twice as many rows as others are one block, too.
    of = [rows, 2 * rows] if kind.experts and not kind.pairs else [rows]
    most = dict.fromkeys(next((size for size in SHAPED if count <= size), 0) for count in of)
    for family, block_n, columns, warps, programs_k in [shape for size in most if size for shape in SHAPED[size]]:
        if programs_k > 1 and 4 * programs_k > tiles or family == "few_rows" and warps > tiles:
            continue
        step = warps if family == "few_rows" else 1
        stage = step * (block_n * planes.WORDS[bits] * 2 + planes.TILE[bits] * columns * 2)
        stages = max(2, min(4, gpu.shared * 7 // 8 // stage))
        prescale = family == "many_rows" and run_length(bits, group_size, width)[1] * 32 < columns
        parts = 1 if kind.experts else programs_k
        found.append(Config(family, block_n, columns, 1, parts, warps, stages, prescale, pdl=gpu.pdl))
    return list(dict.fromkeys(found))


def compile_all(launches: Iterable[tuple[Any, ...]], gpu: Gpu, jobs: int) -> int:
    """Compile products for this GPU into Triton's cache, some at a time; returns how many of them cannot be.

    launches: configuration, bits, rows of x, out, in, group size, zero points or none, the dtype's name, and
    a `Kind` if it is not PLAIN.
    """
    wanted = list(dict.fromkeys(launches))
    with multiprocessing.get_context("spawn").Pool(max(1, min(jobs, len(wanted)))) as pool:
        return sum(pool.imap_unordered(functools.partial(_fails, gpu), wanted))


def _fails(gpu: Gpu, one: tuple[Any, ...]) -> bool:
    from llmq_kernels.triton.compile import compile_launch, warm
    from llmq_kernels.triton.variants import launch_of

    config, bits, m, out, width, group_size, zeros, dtype, kind = (*one, PLAIN)[:9]
    try:
        launch = launch_of(config, bits, m, out, width, group_size, zeros, getattr(torch, dtype), gpu.backend, kind)
        if torch.cuda.is_available():
            warm(launch)
        else:
            compile_launch(launch, gpu.target)
    except Exception:  # noqa: BLE001  (a compiler may raise anything; the measurement skips what it cannot compile)
        return True
    return False


def seconds(x: Tensor, weights: list[PackedInt], config: Config, backend: str, routing: Routing | None = None) -> float:
    """Seconds per product: the median over replays of a graph with one product per copy of the weight."""

    def once(weight: PackedInt) -> Tensor:
        return planes.run(x, weight, None, config, backend, routing)

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
