"""The memory that `--fit` predicts beside what a process really takes: random models, loaded and run on the CPU.

    python scripts/bench_fit.py --work /tmp/fit --shape qwen3-0.6b --bits 2,3,4,8

Each model is quantized by RTN with uniform bits, and kept in --work. A fresh process loads the folder by `llmq.load`,
reads a prompt of --context tokens, as many at a time as a folder of `--fit` says, and generates --new more, --prompts
times; its peak is VmHWM. Predicted: `allocation.memory`, of the unquantized folder alone. Processes are run one after
the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llmq import job
from llmq.allocation.chunks import chunk_of
from llmq.allocation.memory import Line, fixed_lines, weight_bytes
from llmq.grids.scheme import Scheme
from llmq.machine import peak_memory
from llmq.recipe.recipe import Recipe

HERE = Path(__file__).resolve().parent
SHAPES = ("llama-1b", "gemma-3-1b", "qwen3-0.6b", "qwen3-moe-1b")
GROUP = 128
MIB = 1 << 20


def main() -> None:
    """Parse; write, quantize, predict, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all")
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2, help="the heap that one leaves has holes for the next")
    parser.add_argument("--work", type=Path, default=Path("fit"))
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(serve(args.worker[0], *map(int, args.worker[1:])))
        return
    table = Table("model", "bits", "weights", "predicted", "measured", "above", "after loading", "largest posts")
    for shape in args.shape or SHAPES:
        source = write(shape, args.work)
        lines, weights, chunk = predict(source, args.context + args.new)
        for bits in map(int, args.bits.split(",")):
            folder = quantized(source, bits)
            began = time.perf_counter()
            asked = map(str, (args.context, args.new, args.prompts, chunk))
            run = [sys.executable, __file__, "--worker", str(folder), *asked]
            done = subprocess.run(run, check=True, capture_output=True, text=True)
            loaded, most = map(int, done.stdout.split()[-2:])
            told = weights[bits] + sum(line.nbytes for line in lines)
            posts = ", ".join(f"{line.what} {line.nbytes / MIB:.0f}" for line in lines[:4])
            numbers = [f"{n / MIB:.0f}" for n in (weights[bits], told, most)]
            row = (shape, str(bits), *numbers, f"{told / most - 1:+.1%}", f"{loaded / MIB:.0f}", posts)
            table.add_row(*row)
            print(*row, f"{time.perf_counter() - began:.0f} s", flush=True)
    Console(width=220).print(table)


def write(shape: str, work: Path) -> Path:
    """The folder of a random model."""
    folder = work / shape
    if not (folder / "model.safetensors.index.json").exists():
        longer = ["--set", "max_position_embeddings=32768"]
        subprocess.run(
            [sys.executable, str(HERE / "make_random_model.py"), str(folder), "--shape", shape, *longer], check=True
        )
    return folder


def quantized(source: Path, bits: int) -> Path:
    """The folder with all weights of these bits."""
    folder = source.parent / f"{source.name}-{bits}"
    if not (folder / "report.json").exists():
        options = ["--bits", str(bits), "--group-size", str(GROUP), "--method", "rtn", "--range", "minmax"]
        command = [sys.executable, "-m", "llmq.cli", "quantize", str(source), "-o", str(folder), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def predict(source: Path, context: int) -> tuple[list[Line], dict[int, int], int]:
    """The lines that do not depend on bits, the weights' bytes by bits, and the tokens read at a time (0: all)."""
    plan = job.plan(str(source), Recipe(methods=("rtn",), scheme=Scheme(4, GROUP)))
    shapes = [(item.shape[0], item.shape[1]) for item in plan.weights if item.scheme is not None]
    weights = {b: sum(weight_bytes(Scheme(b, GROUP), shape, plan.dtype) for shape in shapes) for b in range(2, 9)}
    return fixed_lines(plan, "cpu", context), weights, chunk_of(plan, context) or 0


def serve(folder: str, context: int, new: int, prompts: int, chunk: int) -> str:
    """Load, read a prompt and generate, some times: the peaks in bytes after loading and in the end."""
    import llmq

    model = llmq.load(folder, device_map="cpu")
    loaded = peak_memory()
    ids = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "prefill_chunk_size": chunk or None}
    for _ in range(prompts):
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return f"{loaded} {peak_memory()}"


if __name__ == "__main__":
    main()
