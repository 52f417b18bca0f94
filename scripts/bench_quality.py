"""The quality of each method and bit width, as one table: perplexity, KL to the base and top-1 agreement.

    python scripts/bench_quality.py MODEL CALIBRATION.txt HELDOUT.txt [--method rtn gptq] [--schemes 4g128 3g128 2g64]

    python scripts/bench_quality.py MODEL CALIBRATION.txt HELDOUT.txt --recipe best-4 w4a16-gptq --samples 128

Calibrates on 32 windows of 512 tokens (or --samples), measures on the first 200 windows of 512 (the protocol of
docs/evaluation.md), every model in float32 through stock from_pretrained (--kernels: llmq.load). KL is the mean over
positions of KL(base ‖ quantized), in nats. For each scheme, methods that do not support it are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq import methods
from llmq.data.tokens import tokenize
from llmq.grids.scheme import Scheme
from llmq.recipe import presets
from llmq.recipe.recipe import Calibration, Recipe

METHODS = ["rtn", "hqq", "awq", "gptq", "awq+gptq", "signround", "gptq+signround", "nf4"]


def load(folder: Path, kernels: bool = False) -> Any:
    """A model in float32, by stock from_pretrained, or on llmq's kernels."""
    if kernels:
        return llmq.load(folder, device_map="cpu", dtype="float32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergences(base: Any, others: Sequence[Any], windows: Tensor, batch: int = 2) -> list[tuple[float, float, float]]:
    """(perplexity, KL in nats, share of positions with the same top token) of each, over windows [count, tokens]."""
    sums = [[0.0, 0.0, 0.0] for _ in others]
    count = 0
    with torch.inference_mode():
        for ids in windows.split(batch):
            want = base(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            share, top, count = want.exp(), want.argmax(-1), count + len(want)
            for total, other in zip(sums, others, strict=True):
                have = other(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
                total[0] -= float(have.gather(1, ids[:, 1:].reshape(-1, 1)).sum(dtype=torch.float64))
                total[1] += float((share * (want - have)).sum(dtype=torch.float64))
                total[2] += int((top == have.argmax(-1)).sum())
    return [(math.exp(nll / count), kl / count, same / count) for nll, kl, same in sums]


def divergence(base: Any, other: Any, windows: Tensor, batch: int = 2) -> tuple[float, float, float]:
    """`divergences` of one model."""
    return divergences(base, [other], windows, batch)[0]


def parse_scheme(text: str) -> Scheme:
    """'4g128', '4g64a' (asymmetric), '4g64p' (powers of two as scales), '8gc' (per channel), 'nf4' (double quantized),
    or a grid first: 'fp8:8gc', 'ternary:2g64l' (packed for llmq), 'kmeans:3gc/16' (levels of 16 rows)."""
    if text == "nf4":
        return Scheme(4, 64, grid="nf4", double_quant=True)
    text, _, rows = text.partition("/")
    grid, _, sizes = text.rpartition(":")
    scales, packing = "pow2" if sizes.endswith("p") else "free", "llmq" if sizes.endswith("l") else "standard"
    bits, group = sizes.rstrip("pla").split("g")
    size = None if group == "c" else int(group)
    own = {"scales": scales, "packing": packing, "level_rows": int(rows or 1)}
    return Scheme(int(bits), size, "a" not in sizes, grid or "int", **own)


def rounds(method: str, scheme: Scheme) -> bool:
    """Whether the methods joined by '+' have a quantizer that rounds to the scheme."""
    return methods.make(Recipe(methods=tuple(method.split("+")))).quantizer.refusal(scheme) is None


def recipes_of(args: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """The presets that were named, or each method for each scheme that it rounds to, with the text that was given."""
    calibration = Calibration(args.calibration, samples=args.samples, seqlen=512)
    for name in args.recipe:
        yield name, dataclasses.replace(presets.recipe(name), calibration=calibration)
    if args.recipe:
        return
    for scheme in map(parse_scheme, args.schemes):
        for method in (method for method in args.method if rounds(method, scheme)):
            options = {"range": args.range} if args.range else {}
            yield method, Recipe(tuple(method.split("+")), scheme, options=options, calibration=calibration)


def main() -> None:
    """Quantize every scheme × method, or every preset, then measure all of them in one pass over the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--method", nargs="+", default=METHODS)
    parser.add_argument("--recipe", nargs="+", default=[], help="presets, in place of methods and schemes")
    parser.add_argument("--range")
    parser.add_argument("--schemes", nargs="+", default=["4g128", "3g128", "2g64"])
    parser.add_argument("--kernels", action="store_true", help="for formats that stock from_pretrained does not know")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows; distill needs 128 or more")
    parser.add_argument("--windows", type=int, default=200)
    args = parser.parse_args()
    ids = tokenize(args.heldout.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(args.model))
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[: args.windows]
    base = load(args.model)
    rows, models = [], [base]
    with tempfile.TemporaryDirectory() as folder:
        for label, recipe in recipes_of(args):
            out = Path(folder) / str(len(rows))
            began, used = time.perf_counter(), time.process_time()
            report = llmq.quantize(str(args.model), out, recipe)
            seconds, used = time.perf_counter() - began, time.process_time() - used
            models.append(load(out, args.kernels))
            rows.append([label, str(recipe.scheme), f"{report.bits_per_weight:.3f}", f"{seconds:.1f}", f"{used:.1f}"])
            print(*rows[-1], sep="\t", flush=True)
    results = divergences(base, models, windows)
    reference = results[0][0]
    table = Table(
        "method", "scheme", "bits/weight", "perplexity", "to base", "KL", "same top token", "seconds", "of processors"
    )
    table.add_row("base", "", "16", f"{reference:.4f}", "", "0", "1", "", "")
    for (method, name, bits, *took), (value, kl, same) in zip(rows, results[1:], strict=True):
        change = f"{100 * (value / reference - 1):+.2f} %"
        table.add_row(method, name, bits, f"{value:.4f}", change, f"{kl:.6f}", f"{same:.5f}", *took)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
