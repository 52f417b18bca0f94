"""Compare each matrix product of llmq with torch's, bitsandbytes' and GemLite's, and with the device's memory limit.

    python scripts/bench_kernels.py -o build/kernels.json --shapes 4096,8192 --minutes 9
    python scripts/bench_kernels.py -o build/kernels.json --shapes llama8b,llama70b --minutes 9 --resume

Shapes are [outputs]x[inputs], the size of a square, or llama8b, llama70b: every linear layer of the decoder blocks of
Llama-3; llama8b-fused, llama70b-fused: the same with weights that share an input fused. Times are medians of
interleaved repeats; weights are rotated among copies of twice the cache size; on a GPU each operator runs in a CUDA
graph. Every operator's result is first compared, at every number of rows, with a product in float32; a wrong one is
marked WRONG and not timed. The limit is (packed weight + input + output) / the bandwidth of a large copy in the same
run. Writes JSON after every cell, and a plot if matplotlib is installed; prints the tables last. --resume measures only
the cells that are missing in the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import bench_gpu as gpu
import bench_timing as timing
import torch
from bench_operators import BASE, OPERATORS, Operator, Prepared, Weight, first_line, mistake, random_weight, rotated
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = {
    "llama8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "llama70b": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
    "llama8b-fused": [(6144, 4096), (28672, 4096)],
    "llama70b-fused": [(10240, 8192), (57344, 8192)],
}
# Those of the goals first, for a run that ends early.
ROWS = "1,16,64,256,4096,32,128,2,4,8,1024"
AGAIN = "torch again"
"""The baseline a second time, in every cell: how far the two are apart is how far ratios can be trusted."""
CHECKED = 64
"""Rows of a result that are checked: the float32 product of all 4096 would take longer than the measurement."""
OURS = "llmq int"

Cell = dict[str, Any]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """'llama8b,8192,64x128' → [outputs, inputs] of each, without duplicates. Raises ValueError."""
    found: list[tuple[int, int]] = []
    for name in text.split(","):
        if name in SHAPES:
            found += SHAPES[name]
        else:
            sizes = [int(size) for size in name.split("x")]
            if len(sizes) > 2 or min(sizes) < 1:
                raise ValueError(f"a shape is OUTxIN, a size, or {', '.join(SHAPES)}, not {name!r}")
            found.append((sizes[0], sizes[-1]))
    return list(dict.fromkeys(found))


def check(operator: Operator, prepared: Prepared, x: Tensor) -> Cell:
    """The first call of an operator on x, against float32: its error, its seconds (compiling included), its state."""
    result: list[Tensor] = []
    try:
        seconds = timing.once(lambda: result.append(operator(x)), x.device)
    except Exception as error:  # from another package or a compiler: shown in the table
        return {"state": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
    few = torch.linspace(0, len(x) - 1, min(len(x), CHECKED), device=x.device).round().long()
    off, wrong = mistake(result[0][few] if len(result[0]) == len(x) else result[0], prepared.expected(x[few]))
    return {
        "state": "WRONG" if wrong else "ok",
        "error": off if math.isfinite(off) else None,
        "first_seconds": seconds,
        "bytes": prepared.bytes,
    }


def measure_cell(shape: tuple[int, int], ready: dict[str, Any], x: Tensor, bandwidth: float, seconds: float) -> Cell:
    """All operators at one number of rows. ready: name → (Prepared, copies), or a result with the reason why it cannot
    run.
    """
    results: dict[str, Cell] = {}
    laps = {}
    for name, made in ready.items():
        if isinstance(made, dict):
            results[name] = made
            continue
        results[name] = check(made[1][0], made[0], x)
        if results[name]["state"] == "ok":
            try:
                laps[name] = timing.lap(made[1], x)
            except RuntimeError as error:
                results[name] |= {"state": "failed", "reason": f"no CUDA graph: {first_line(error)}"}
            if x.device.type == "cuda":
                results[name]["host_us"] = gpu.host_microseconds(made[1][0], x)
    if BASE in laps:
        laps[AGAIN] = timing.lap(ready[BASE][1], x)
    moved = x.nbytes + len(x) * shape[0] * x.element_size()
    before, measured = gpu.clocks(), timing.measure(laps, seconds)
    again = measured.pop(AGAIN, None)
    for name, times in measured.items():
        median = statistics.median(times)
        limit = (results[name]["bytes"] + moved) / bandwidth
        results[name] |= {"ms": 1e3 * median, "best_ms": 1e3 * min(times), "worst_ms": 1e3 * max(times)}
        results[name] |= {"note": ready[name][0].note} if ready[name][0].note else {}
        results[name] |= {"repeats": len(times), "limit_ms": 1e3 * limit, "of_limit": limit / median}
    base = results[BASE]
    if again is not None:
        base["again_ms"] = 1e3 * statistics.median(again)
    for result in results.values():
        if "ms" in base and "ms" in result:
            result["ratio"] = base["ms"] / result["ms"]
            result["best_ratio"] = base["best_ms"] / result["best_ms"]
    clocks = {"before": before, "after": gpu.clocks()}
    return {"shape": list(shape), "rows": len(x), "copy_bandwidth": bandwidth, "clocks": clocks, "operators": results}


def prepare(name: str, weight: Weight, cache: int) -> Any:
    """An operator on a weight: (Prepared, the operator on copies of the weight), or a result with the reason why it
    cannot run.
    """
    try:
        made = OPERATORS[name](weight)
        if isinstance(made, str):
            return {"state": "absent", "reason": made}
        return made, rotated(made, timing.copies_needed(made.bytes, cache))
    except Exception as error:  # from another package or out of memory: shown in the table
        return {"state": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}


def save(file: Path, report: Cell) -> None:
    """Write the JSON atomically."""
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(scratch, file)


def resumed(file: Path, report: Cell) -> Cell:
    """The report in `file` to resume. Raises SystemExit if its settings differ from those of `report`."""
    before: Cell = json.loads(file.read_text())
    for key in ("settings", "machine"):
        if changed := [k for k, value in report[key].items() if before[key].get(k) != value and k != "load"]:
            name = changed[0]
            raise SystemExit(f"{file} was made with {name} {before[key].get(name)}, not {report[key][name]}")
    return before


def measure_all(args: argparse.Namespace, report: Cell, device: torch.device) -> int:
    """Measure the missing cells while there is time, saving after each. Returns how many are still missing."""
    settings, dtype = report["settings"], getattr(torch, args.dtype)
    done = {(tuple(cell["shape"]), cell["rows"]) for cell in report["cells"]}
    rows = [int(count) for count in args.rows.split(",")]
    lacking = [(shape, m) for shape in parse_shapes(args.shapes) for m in rows if (shape, m) not in done]
    end = time.monotonic() + 60 * args.minutes
    cache = timing.cache_bytes(device)
    bandwidth = timing.copy_bandwidth(device, min(1.0, args.seconds)) if lacking else math.nan
    kind = {key: settings[key] for key in ("bits", "group_size", "asymmetric", "dtype")}
    if gpu.warm(dict.fromkeys(shape for shape, _ in lacking), rows, kind, device):
        print("some kernels do not compile: their cells say so", flush=True)
    held: tuple[int, int] | None = None
    ready: dict[str, Any] = {}
    while lacking and time.monotonic() < end:
        shape, m = lacking[0]
        if shape != held:
            ready.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            weight = random_weight(shape, args.bits, args.group_size, args.asymmetric, dtype, device)
            for name in settings["operators"]:
                ready[name] = prepare(name, weight, cache)
            held = shape
            refuse_without_ours(ready, device)
        generator = torch.Generator(device).manual_seed(m)
        x = torch.randn(m, shape[1], device=device, dtype=dtype, generator=generator)
        share = min(args.seconds, (end - time.monotonic()) / len(lacking))
        began = time.monotonic()
        cell = measure_cell(shape, ready, x, bandwidth, share)
        if "ms" in cell["operators"].get(OURS, {}):
            cell["operators"][OURS] |= gpu.chosen(shape, m, kind, device)
        report["cells"].append(cell)
        save(args.out, report)
        told = [f"{name} {r['ms']:.4g} ms" if "ms" in r else f"{name} {r['state']}" for name, r in shown(cell)]
        print(f"{shape[0]}x{shape[1]}, {m} rows ({time.monotonic() - began:.1f} s):", ", ".join(told), flush=True)
        lacking.pop(0)
    return len(lacking)


def refuse_without_ours(ready: dict[str, Any], device: torch.device) -> None:
    """Raises SystemExit if, on a GPU, operators of ours were asked for and none could be made: time there is short."""
    ours = {name: made for name, made in ready.items() if name.startswith("llmq")}
    if device.type == "cuda" and ours and all(isinstance(made, dict) for made in ours.values()):
        reasons = "; ".join(f"{name}: {made['reason']}" for name, made in ours.items())
        raise SystemExit(f"no operator of llmq could be made ({reasons}); is PYTHONPATH .:kernels:eval:scripts?")


def shown(cell: Cell) -> list[tuple[str, Cell]]:
    """The available operators."""
    return [(name, result) for name, result in cell["operators"].items() if result["state"] != "absent"]


def tables(report: Cell) -> list[Table]:
    """A table of every operator, and a short one of llmq's integer product: ratio to torch by rows, fraction of copy
    bandwidth.
    """
    cells = report["cells"]
    rows = sorted({cell["rows"] for cell in cells})
    at = {(tuple(cell["shape"]), cell["rows"]): cell["operators"] for cell in cells}
    shapes = list(dict.fromkeys(tuple(cell["shape"]) for cell in cells))
    kind = report["settings"]["dtype"]
    everything = Table("out x in", "operator", *map(str, rows), title=f"times as fast as torch {kind}, by rows of x")
    short = Table("out x in", *map(str, rows), f"of copy bandwidth, {rows[0]} rows", title=f"{OURS}, the same")

    def text(result: Cell, key: str = "ratio") -> str:
        return f"{result[key]:.2f}" if key in result else "" if "ms" in result else str(result["state"])

    for shape in shapes:
        for name in report["settings"]["operators"]:
            results = [at.get((shape, m), {}).get(name, {"state": ""}) for m in rows]
            if name == BASE or all(result["state"] == "absent" for result in results):
                continue
            everything.add_row("x".join(map(str, shape)), name, *map(text, results))
            if name == OURS:
                share = f"{100 * results[0]['of_limit']:.0f} %" if "of_limit" in results[0] else ""
                short.add_row("x".join(map(str, shape)), *map(text, results), share)
                if report["machine"]["load"]:
                    best = [text(result, "best_ratio") for result in results]
                    short.add_row("  best of the repeats", *best, "")
    return [everything, short]


def plot(report: Cell, file: Path) -> str:
    """Plot the ratios by rows, one panel per shape. Returns a status line."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed"
    shapes = list(dict.fromkeys(tuple(cell["shape"]) for cell in report["cells"]))
    across = min(4, len(shapes))
    down = -(-len(shapes) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), squeeze=False, sharey=True)
    for axis in axes.flat[len(shapes) :]:
        axis.set_axis_off()
    for axis, shape in zip(axes.flat, shapes, strict=False):
        cells = sorted(
            (cell for cell in report["cells"] if tuple(cell["shape"]) == shape), key=lambda cell: cell["rows"]
        )
        for number, name in enumerate(report["settings"]["operators"]):
            points = [(c["rows"], c["operators"][name]["ratio"]) for c in cells if "ratio" in c["operators"][name]]
            if points and name != BASE:
                axis.plot(*zip(*points, strict=True), marker=".", color=f"C{number}", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks([cell["rows"] for cell in cells], [str(cell["rows"]) for cell in cells], fontsize="small")
        axis.set_title(f"{shape[0]} x {shape[1]}")
        axis.set_xlabel("rows")
    axes[0][0].set_ylabel(f"times as fast as torch {report['settings']['dtype']}")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(1, len(handles)))
    figure.suptitle(f"{report['machine']['device']}, {report['settings']['bits']} bits")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return f"plot: {file}"


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/bench_kernels.json"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], default=4)
    parser.add_argument("--group-size", type=int, default=128, help="0: one group a row")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--shapes", default="llama8b,llama70b,4096,8192")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--operators", default=",".join(OPERATORS), help="to measure; torch is always included")
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell is started after this time")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for one cell with all operators")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's own choice by default")
    parser.add_argument("--resume", action="store_true", help="resume from the existing JSON")
    args = parser.parse_args(arguments)
    names = list(dict.fromkeys([BASE, *args.operators.split(",")]))
    if unknown := [name for name in names if name not in OPERATORS]:
        parser.error(f"no operator {unknown[0]!r}; there are {', '.join(OPERATORS)}")
    try:
        parse_shapes(args.shapes)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    settings = {key: getattr(args, key) for key in ("bits", "group_size", "asymmetric", "dtype")}
    about = timing.machine(device) | {"load": timing.busy(device)}
    report: Cell = {"machine": about, "settings": settings | {"operators": names}, "cells": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.resume and args.out.exists():
        report = resumed(args.out, report)
    with torch.inference_mode():
        left = measure_all(args, report, device)
    save(args.out, report)
    console = Console(width=max(100, 40 + 9 * len(args.rows.split(","))))
    reasons = {name: r["reason"] for cell in report["cells"] for name, r in cell["operators"].items() if "reason" in r}
    for name, reason in reasons.items():
        console.print(f"{name}: {reason}", highlight=False)
    if report["machine"]["load"]:
        console.print(report["machine"]["load"], highlight=False)
    speed = statistics.median(cell["copy_bandwidth"] for cell in report["cells"]) if report["cells"] else math.nan
    console.print(
        f"{about['device']}, torch {about['versions']['torch']}, {about['commit']}, copy {speed / 1e9:.0f} GB/s"
    )
    console.print(
        plot(report, args.out.with_suffix(".png")) if report["cells"] else "nothing measured", highlight=False
    )
    if left:
        console.print(f"[bold]{left} cells left: run again with --resume")
    if report["cells"]:
        console.print(*tables(report))


if __name__ == "__main__":
    main()
