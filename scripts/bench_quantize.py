"""Time and memory of `llmq quantize`, compared with only reading the source's bytes and writing the result's bytes.

    python scripts/make_random_model.py /tmp/7b --shape llama-2-7b
    python scripts/bench_quantize.py /tmp/7b -o /tmp/7b-w4 --method rtn
    python scripts/bench_quantize.py /tmp/7b -o /tmp/7b-w4 --method gptq --samples 4 --seqlen 256

With --each, one run after the other, as a table: of one block through each quantizer, for example.

    python scripts/make_random_model.py /tmp/block --shape llama-2-7b --layers 1 --set vocab_size=3000
    python scripts/bench_quantize.py /tmp/block -o /tmp/out --samples 8 --seqlen 256 \\
        --each "--method gptq" "--method gptq --grid nvfp4" "--method vq --bits 2 --group-size 8"

With --stages, the processor seconds of each stage of every run as well (scripts/stages.py): reading, forward passes,
the sums of statistics, corrections, factoring, solving (columns), sweeps, range search, packing, writing,
verification and the rest, which is mostly imports, the plan, reading the text and reports.

Everything else goes to `llmq quantize`; OUT is deleted before and after a run. The peak is the largest resident size
of the process, processor seconds are those of all its threads, and ratios compare these with the first run's. Prints
one line for each run at its end, and the table last.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

PIECE = 1 << 24


@dataclass(frozen=True)
class Run:
    """One run of `llmq quantize`: what it was asked for, its seconds, those of processors, its peak in bytes, its
    report.json, and the seconds and processor seconds of its stages."""

    options: str
    seconds: float
    processor: float
    peak: int
    report: dict[str, object]
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)


def copy_time(source: Path, size: int, out: Path) -> float:
    """Seconds to read every shard of the source and write `size` bytes, synced."""
    began = time.perf_counter()
    last = b"\0" * PIECE
    for shard in sorted(source.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                last = piece
    with out.open("wb", buffering=0) as file:
        while size > 0:
            size -= file.write(last[:size]) if last else size
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def measure(model: Path, out: Path, options: list[str], stages: bool = False) -> Run:
    """Run `llmq quantize` in a process of its own, and delete its result. Raises SystemExit if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        program = [str(Path(__file__).parent / "stages.py"), str(times)] if stages else ["-m", "llmq.cli"]
        run = _measure([sys.executable, *program, "quantize", str(model), "-o", str(out), *options], out, options)
        if stages:
            run.stages.update({name: (wall, used) for name, (wall, used) in json.loads(times.read_text()).items()})
    return run


def _measure(command: list[str], out: Path, options: list[str]) -> Run:
    began = time.perf_counter()
    process = subprocess.Popen(command)
    # This process alone: getrusage(RUSAGE_CHILDREN) has the largest peak of all that ever ran.
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{shlex.join(command)} failed: exit status {os.waitstatus_to_exitcode(status)}")
    report = json.loads((out / "report.json").read_text())
    shutil.rmtree(out)
    return Run(shlex.join(options), seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, report)


def told(run: Run, copied: float) -> str:
    """One line about a run; copied: the seconds that copying takes."""
    source, size, predicted = (int(str(run.report[k])) for k in ("source_bytes", "bytes", "predicted_memory"))
    return (
        f"{run.options}: {run.seconds:.0f} s, {run.seconds / copied:.1f} x "
        f"reading {source / 2**30:.2f} GiB "
        f"and writing {size / 2**30:.2f} GiB ({copied:.0f} s); peak {run.peak / 2**30:.2f} GiB, "
        f"predicted {predicted / 2**30:.2f} ({100 * (predicted / run.peak - 1):+.0f} %)"
    )


def table(runs: list[Run]) -> Table:
    """All runs; ratios are to the first."""
    made = Table("options", "bits", "seconds", "of processors", "ratio", "peak GiB", "predicted")
    for run in runs:
        made.add_row(
            run.options,
            f"{float(str(run.report['bits_per_weight'])):.3f}",
            f"{run.seconds:.0f}",
            f"{run.processor:.0f}",
            f"{run.processor / runs[0].processor:.2f}",
            f"{run.peak / 2**30:.2f}",
            f"{int(str(run.report['predicted_memory'])) / 2**30:.2f}",
        )
    return made


def stage_table(runs: list[Run]) -> Table:
    """The processor seconds of every run's stages."""
    names = list(dict.fromkeys(name for run in runs for name in run.stages))
    made = Table("options", *names)
    for run in runs:
        made.add_row(run.options, *(f"{run.stages.get(name, (0, 0))[1]:.1f}" for name in names))
    return made


def main() -> None:
    """One run, or several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--each", nargs="+", default=[""], metavar="OPTIONS", help="of one run each, beside the others")
    parser.add_argument("--stages", action="store_true", help="also the processor seconds of each stage")
    args, options = parser.parse_known_args()
    runs = []
    for each in args.each:
        runs.append(measure(args.model, args.out, shlex.split(each) + options, args.stages))
        size = int(str(runs[-1].report["bytes"]))
        print(told(runs[-1], copy_time(args.model, size, args.out.with_suffix(".copy"))), flush=True)
    if len(runs) > 1:
        Console(width=160).print(table(runs))
    if args.stages:
        Console(width=160).print(stage_table(runs))


if __name__ == "__main__":
    main()
