"""Decode times that --target-latency predicts, beside those of the folders.

    python scripts/bench_latency.py MODEL [--context 512] [--mixes 4] [--bits 4,8,16]

Folders with one scheme for all weights, and with random mixes of all candidates, are written by RTN. A fresh process
loads each by `llmq.load`, reads a prompt, and generates: measured is the median time from one token to the next, as a
streamer gets them. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import llmq
from llmq import job
from llmq.allocation import allocate
from llmq.allocation.choose import Allocation, recipe_of
from llmq.allocation.goal import Goal
from llmq.allocation.groups import Group
from llmq.allocation.latency.table import step_times
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.watch import Silent

GROUP = 128


def main() -> None:
    """Predict, write, load, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--mixes", type=int, default=4)
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(serve(args.model, args.context, args.batch, args.new, args.device))
        return
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, GROUP))
    goal = Goal(bits=4.125)
    plan = job.plan(args.model, recipe, goal=goal)
    groups = allocate.check(plan, goal)
    began = time.perf_counter()
    times = step_times(plan, groups, torch.device(args.device), args.context, args.batch, Told())
    print(f"timed in {time.perf_counter() - began:.0f} s", flush=True)
    table = Table("weights", "stored bits", "predicted ms", "measured ms", "predicted / measured")
    for name, picks in choices(groups, [int(b) for b in args.bits.split(",")], args.mixes):
        predicted = sum(row[c] for row, c in zip(times, picks, strict=True))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            report = llmq.quantize(args.model, out, recipe_of(recipe, groups, Allocation(picks, 0.0)))
            options = ["--context", args.context, "--batch", args.batch, "--new", args.new, "--device", args.device]
            run = [sys.executable, __file__, str(out), "--worker", *map(str, options)]
            done = subprocess.run(run, check=True, capture_output=True, text=True)
        measured = float(done.stdout.split()[-1])
        row = [name, f"{report.bits_per_weight:.2f}", *(f"{ms:.2f}" for ms in (predicted, measured))]
        table.add_row(*row, f"{predicted / measured:.3f}")
        print(*row, f"{predicted / measured:.3f}", sep="\t", flush=True)
    Console(width=120).print(table)


class Told(Silent):
    """Prints each measurement."""

    def step(self, text: str) -> None:
        """See Watch."""
        print(text, flush=True)


def choices(groups: Sequence[Group], bits: Sequence[int], mixes: int) -> list[tuple[str, tuple[int, ...]]]:
    """One scheme for all groups, and random mixes."""
    found = []
    for wanted in bits:
        places = [[s.bits if s is not None else 16 for s in group.candidates].index(wanted) for group in groups]
        found.append((f"{wanted} bits", tuple(places)))
    dice = random.Random(0)
    for number in range(mixes):
        found.append((f"mix {number + 1}", tuple(dice.randrange(len(group.candidates)) for group in groups)))
    return found


class Stamps:
    """A streamer that keeps the time of each token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        """A token has come; the prompt comes first."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def serve(folder: str, context: int, batch: int, new: int, device: str) -> float:
    """Load, read a prompt and generate: the median milliseconds from one token to the next."""
    model = llmq.load(folder, device_map=device)
    ids = torch.randint(0, 200, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for _ in range(2):
        stamps = Stamps()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=stamps if batch == 1 else None,
            )
        found = [1000 * (after - before) for before, after in zip(stamps.at[2:], stamps.at[3:], strict=False)]
    return statistics.median(found)


if __name__ == "__main__":
    main()
