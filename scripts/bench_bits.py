"""Bits to a budget: for each score and average of code bits, the divergence predicted, proved, and reached.

    python scripts/bench_bits.py MODEL CALIBRATION.txt HELDOUT.txt [--score divergence linear] [--bits 3.5 3 2.5 2.25]

Calibrates on 32 windows of 512 tokens (or --samples), measures on the first 200 windows of 512 of the held-out text, in
float32 through stock from_pretrained, as bench_quality.py does. A budget of 3 code bits is that of 3-bit weights with
their scales. `proved` is without corrections; `choosing` is the processor time of scoring, solving and proving (scores
are kept for a score's other budgets). Without a score, uniform bits are measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from bench_quality import divergences, load
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import llmq
from llmq.allocation.goal import parse_candidates
from llmq.data.tokens import tokenize
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Calibration, Recipe

GROUP = 128


def main() -> None:
    """Quantize for every score and budget, then measure all folders in one pass over the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--score", nargs="*", default=["divergence"])
    parser.add_argument("--bits", nargs="+", type=float, default=[3.5, 3.0, 2.5, 2.25])
    parser.add_argument("--uniform", nargs="*", type=int, default=[], help="bits of all weights, for comparison")
    parser.add_argument("--candidates", default="")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=200)
    args = parser.parse_args()
    ids = tokenize(args.heldout.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(args.model))
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[: args.windows]
    calibration = Calibration(args.calibration, samples=args.samples, seqlen=512)
    methods = tuple(args.method.split("+"))
    rows, models = [], [base := load(args.model)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        runs: list[tuple[str, float]] = [("uniform", bits) for bits in args.uniform]
        runs += [(score, bits) for score in args.score for bits in args.bits]
        for name, bits in runs:
            out, began = Path(folder) / str(len(rows)), time.process_time()
            if name == "uniform":
                recipe = Recipe(methods, Scheme(int(bits), GROUP), calibration=calibration)
                report = llmq.quantize(str(args.model), out, recipe)
            else:
                recipe = Recipe(methods, Scheme(4, GROUP), calibration=calibration)
                candidates = parse_candidates(args.candidates, recipe.scheme) if args.candidates else ()
                goal = llmq.Goal(bits=bits + 16 / GROUP, score=name, candidates=candidates)
                report = llmq.quantize(str(args.model), out, recipe, goal=goal)
            used = time.process_time() - began
            chosen = report.chosen
            told = ["", "", ""]
            if chosen is not None:
                truth = "" if chosen.chosen.truth is None else f"{chosen.chosen.truth:.5f}"
                told = [f"{chosen.chosen.predicted:.5f}", truth, f"{chosen.processor:.0f}"]
            rows.append([name, f"{bits:g}", f"{report.bits_per_weight:.3f}", *told, f"{used:.0f}"])
            print(*rows[-1], sep="\t", flush=True)
            models.append(load(out))
    results = divergences(base, models[1:], windows)
    table = Table("score", "code bits", "stored bits", "predicted", "proved", "choosing s", "all s", "KL", "perplexity")
    for row, (perplexity, kl, _) in zip(rows, results, strict=True):
        table.add_row(*row, f"{kl:.5f}", f"{perplexity:.3f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
