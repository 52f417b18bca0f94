"""What each method and bit width costs: perplexity, KL to the base and top-1 agreement, one table.

    python scripts/bench_quality.py MODEL CALIBRATION.txt HELDOUT.txt [--method rtn gptq] [--schemes 4g128 3g128 2g64]

Calibrates on 32 windows of 512 tokens, measures on the first 200 windows of 512 (the protocol of docs/design.md), every
model in float32 through stock from_pretrained. KL is the mean over positions of KL(base ‖ quantized), in nats.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.recipe import Calibration, Recipe, Scheme
from llmq.tokens import tokenize


def load(folder: Path) -> Any:
    """A model in float32, by stock from_pretrained."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(base: Any, other: Any, windows: Tensor, batch: int = 2) -> tuple[float, float, float]:
    """(perplexity, KL in nats, share of positions with the same top token) over windows [count, tokens]."""
    nll = kl = same = count = 0.0
    with torch.inference_mode():
        for ids in windows.split(batch):
            want = base(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            have = other(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            nll -= float(have.gather(1, ids[:, 1:].reshape(-1, 1)).sum(dtype=torch.float64))
            kl += float((want.exp() * (want - have)).sum(dtype=torch.float64))
            same += int((want.argmax(-1) == have.argmax(-1)).sum())
            count += len(want)
    return math.exp(nll / count), kl / count, same / count


def main() -> None:
    """Every scheme × method, a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--method", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--range", default="auto")
    parser.add_argument("--schemes", nargs="+", default=["4g128", "3g128", "2g64"])
    parser.add_argument("--windows", type=int, default=200)
    args = parser.parse_args()
    ids = tokenize(args.heldout.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(args.model))
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[: args.windows]
    base = load(args.model)
    table = Table("method", "scheme", "bits/weight", "perplexity", "to base", "KL", "same top token", "seconds")
    reference, _, _ = divergence(base, base, windows)
    table.add_row("base", "", "16", f"{reference:.4f}", "", "0", "1", "")
    for scheme in args.schemes:
        bits, group = (int(part) for part in scheme.split("g"))
        for method in args.method:
            recipe = Recipe(
                methods=tuple(method.split("+")),
                scheme=Scheme(bits, group),
                options={} if args.range == "auto" else {"range": args.range},
                calibration=Calibration(args.calibration, samples=32, seqlen=512),
            )
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                report = llmq.quantize(str(args.model), Path(folder) / "out", recipe)
                seconds = time.perf_counter() - began
                value, kl, same = divergence(base, load(Path(folder) / "out"), windows)
            row = [method, str(recipe.scheme), f"{report.bits_per_weight:.3f}", f"{value:.4f}"]
            row += [f"{100 * (value / reference - 1):+.2f} %", f"{kl:.6f}", f"{same:.5f}", f"{seconds:.1f}"]
            table.add_row(*row)
            print(*row, sep="\t", flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
