"""QLoRA on the demo model, end to end: an NF4 base against a bf16 base, and how much merging and quantizing keep.

    python scripts/bench_qlora.py [--rows 800] [--epochs 3] [--keep FOLDER]

The instructions are made from the interpreter's own standard library: "write the signature of this function", with the
name and the first line of the docstring; whole modules are held out. Losses are nats per answer token on the held-out
rows. "gain kept" is (base − merged) / (base − tuned): the share of the tune's gain that the merged model keeps. The
next columns are the loss relative to the tune's, and llmq merge's figures averaged over the weights.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llmq import demo
from llmq.adapters.finetune import finetune
from llmq.adapters.merge import MergeReport, merge
from llmq.adapters.settings import Settings
from llmq.data.instructions import read
from llmq.grids.scheme import Scheme
from llmq.inference.pretrained import load_model, load_tokenizer
from llmq.recipe.recipe import Calibration, Recipe
from llmq.report.progress import Bars
from llmq.training.steps import held_out_loss

LONGEST = 200
"""The maximum number of characters of an instruction or answer."""


def pairs(text: str) -> Iterator[dict[str, str]]:
    """An instruction for every documented function of a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            question = f"Write the signature of {node.name}. {docstring.splitlines()[0]}"
            answer = f"def {node.name}({ast.unparse(node.args)}):"
            if max(len(question), len(answer)) <= LONGEST:
                yield {"instruction": question, "output": answer}


def write_rows(folder: Path, rows: int) -> tuple[Path, Path]:
    """train.jsonl of `rows` rows and heldout.jsonl of an eighth as many, from different modules."""
    kinds: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for name, text in demo.documents():
        held_out = hashlib.sha256(f"split {name}".encode()).digest()[0] % 8 == 0
        kinds[held_out] += pairs(text)
    kinds[True] = [row for row in kinds[True] if row not in kinds[False]]
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    for file, found, count in zip(files, (kinds[False], kinds[True]), (rows, rows // 8), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in found[:count]), encoding="utf-8")
    return files


def main() -> None:
    """Two tunes, seven merges, a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--keep", type=Path, help="work in this folder, and resume its runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run(folder, *write_rows(folder, args.rows), args.epochs)


def run(folder: Path, train: Path, heldout: Path, epochs: float) -> None:
    """Run everything in `folder` and print the table."""
    settings = Settings(epochs=epochs, lr=1e-3, eval_share=0)
    tokenizer = load_tokenizer(demo.path())
    rows = read(heldout, tokenizer, seqlen=settings.seqlen).all

    def loss(model: Path) -> float:
        return held_out_loss(load_model(model), rows, settings.batch, "cpu")

    tuned = {}
    for bits in (16, 4):
        with Bars(Console(stderr=True)) as bars:
            one = replace(settings, base_bits=bits)
            tuned[bits] = finetune("demo", train, folder / f"lora{bits}", one, eval_data=heldout, watch=bars)
    merged: dict[str, tuple[float, float, MergeReport]] = {}
    cases: list[tuple[str, Recipe | None, str]] = [("merged, bf16", None, "nf4")]
    for bits in (4, 3):
        gptq = Recipe(scheme=Scheme(bits, 128), calibration=Calibration(str(train), seqlen=512))
        naive = replace(gptq, methods=("rtn",), options={"range": "minmax"})
        cases += [
            (f"merged, GPTQ {bits}-bit", gptq, "nf4"),
            (f"merged, rounded naively to {bits} bits", naive, "nf4"),
            (f"merged into the bf16 base, GPTQ {bits}-bit", gptq, "base"),
        ]
    for name, chosen, trained_on in cases:
        began = time.perf_counter()
        out = folder / name.replace(" ", "-").replace(",", "")
        report = merge("demo", folder / "lora4", out, chosen, plain=chosen is None, trained_on=trained_on)
        merged[name] = (loss(out), time.perf_counter() - began, report)

    base, before, after = loss(demo.path()), tuned[4].before, tuned[4].after
    assert before is not None and after is not None and tuned[16].after is not None
    table = Table("model", "held-out loss", "gain kept", "above QLoRA", "1 + ⟨E,D⟩/⟨D,D⟩", "‖D‖/‖E‖", "seconds")
    table.add_row("base, bf16", f"{base:.4f}", "", "", "", "", "")
    table.add_row("base, NF4", f"{before:.4f}", "", "", "", "", "")
    table.add_row("LoRA on bf16", f"{tuned[16].after:.4f}", "", "", "", "", f"{tuned[16].seconds:.0f}")
    table.add_row("LoRA on NF4 (QLoRA)", f"{after:.4f}", "100 %", "", "", "", f"{tuned[4].seconds:.0f}")
    for name, (value, seconds, report) in merged.items():
        kept = f"{100 * (base - value) / (base - after):.1f} %"
        left = f"{report.mean('survived'):.3f}", f"{report.mean('snr'):.2f}"
        table.add_row(name, f"{value:.4f}", kept, f"{100 * (value / after - 1):+.1f} %", *left, f"{seconds:.0f}")
    console = Console(width=140)
    console.print(f"{tuned[4].rows} rows, {tuned[4].held_out} held out, {tuned[4].steps} steps, {tuned[4].optimizer}")
    console.print(f"LoRA on NF4 against LoRA on bf16: {100 * (after / tuned[16].after - 1):+.2f} % loss")
    console.print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
