"""Rewrite a trained model into an equivalent one with outlier channels, and compare how methods handle them.

    python scripts/plant_outliers.py MODEL CALIBRATION.txt HELDOUT.txt [--channels 4] [--windows 50]

In each scale pair of each block (a norm and the matrices after it, values and their projection …) a few channels are
multiplied by 32 or 64, and the weights that consume them divided by it: powers of two, so the model's output does not
change by a bit. The model and its original are then quantized to W8A8 (int8 weights per channel, int8 activations per
token, as in stock transformers) by each method. Reported are the perplexity and how much of plain W8A8's loss is
recovered.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from bench_quality import divergence, load
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.data.tokens import tokenize
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.plan import pairs_of
from llmq.recipe.recipe import Calibration, Recipe

METHODS = ["rtn", "smoothquant", "outlier_suppression", "outlier_suppression_plus", "smoothquant+gptq"]
FACTORS = torch.tensor([32.0, 64.0])


def plant(source: Path, out: Path, channels: int, seed: int = 0) -> int:
    """Write the model with `channels` outliers in every pair; returns the number of pairs."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    draw = torch.Generator().manual_seed(seed)
    planted = 0
    for name, found in pairs_of(source).items():
        for pair in found.pairs:
            scale = torch.ones(pair.channels)
            chosen = torch.randperm(pair.channels, generator=draw)[:channels]
            scale[chosen] = 1 / FACTORS[torch.randint(len(FACTORS), (len(chosen),), generator=draw)]
            pair.apply(model.get_submodule(name), scale)
            planted += 1
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return planted


def main() -> None:
    """Plant, quantize by each method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--method", nargs="+", default=METHODS)
    parser.add_argument("--static", action="store_true", help="one activation scale per tensor, from calibration data")
    args = parser.parse_args()
    ids = tokenize(args.heldout.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(args.model))
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[: args.windows]
    base = load(args.model)
    reference, _, _ = divergence(base, base, windows)
    scheme = Scheme(8, None, activations=Activations(dynamic=not args.static))
    table = Table("model", "method", "perplexity", "KL to the base", "lost perplexity recovered", title=str(scheme))
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder) / "planted"
        places = plant(args.model, planted, args.channels)
        value, kl, _ = divergence(base, load(planted), windows)
        table.add_row(f"planted ({places} pairs)", "none", f"{value:.4f}", f"{kl:.2e}", "")
        for name, source in (("planted", planted), ("original", args.model)):
            lost = None
            for index, method in enumerate(args.method):
                recipe = Recipe(
                    methods=tuple(method.split("+")),
                    scheme=scheme,
                    calibration=Calibration(args.calibration, samples=32, seqlen=512),
                )
                out = Path(folder) / f"{name}{index}"
                llmq.quantize(str(source), out, recipe)
                value, kl, _ = divergence(base, load(out), windows)
                lost = value - reference if lost is None else lost
                share = "" if index == 0 or name == "original" else f"{1 - (value - reference) / lost:.1%}"
                table.add_row(name, method, f"{value:.4f}", f"{kl:.6f}", share)
                print(name, method, f"{value:.4f}", f"{kl:.6f}", share, flush=True)
    print(f"base perplexity {reference:.4f}, {args.windows} windows")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
