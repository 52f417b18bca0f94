"""Find the scale pairs of every causal-LM type of transformers on a tiny random checkpoint, and apply them all.

For each type: find the pairs with random parameters on the model on the meta device, then apply a new random scale (and
a random shift if possible) to every pair of every block of the checkpoint in stock transformers, and compare its
logits. Mixtures of experts, which `llmq plan` refuses, are included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "architectures")]

LIMIT = 1e-4


def check(name: str) -> dict[str, Any]:
    """Check one type; returns its row of the table."""
    import checks
    import tiny
    import torch

    import llmq
    from llmq.discovery import blocks as discover
    from llmq.discovery import find_pairs as pairs

    row: dict[str, Any] = {"type": name, "result": "not built", "pairs": 0, "rejected": 0, "blocks": {}, "words": ""}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        try:
            tiny.make(name, source)
            real = checks.stock(source)
            before = checks.logits(real, tiny.tokens())
            assert bool(torch.isfinite(before).all())
        except Exception as error:  # a model's code may raise anything
            return row | {"words": first_line(error)}
        row["kind"] = "experts" if checks.is_mixture(real) else "dense"
        try:
            model = discover.build(source, torch.float32)
            found = pairs.find_in(model, discover.find(model))
        except llmq.LlmqError as error:
            return row | {"result": "refused", "words": str(error)}
        except Exception as error:  # shown in the table; the other types continue
            return row | {"result": "fails", "words": first_line(error)}
    row |= checks.pairs_applied(real, found, before, tiny.tokens())
    row["result"] = "unchanged" if row["error"] <= LIMIT else "CHANGED"
    for block, one in found.items():
        told = [*pairs.explain(one.pairs, one.rejections), *pairs.explain(*one.experts)]
        lines = [f"{a} -> {b}" + (f" ({c})" if c else "") for a, b, c in told]
        row["blocks"].setdefault("\n".join(lines), []).append(block)
    row["blocks"] = {", ".join(blocks): lines.split("\n") for lines, blocks in row["blocks"].items()}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def quiet() -> None:
    """Discard a worker's standard error (progress bars and warnings)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


HEAD = """# Scale pairs of every causal-LM type

Where awq, smoothquant and outlier suppression can move scales, found by running a block of a tiny random model of each
type. Written by `scripts/sweep_pairs.py`: all pairs of all blocks were applied, with new random scales and shifts, to
the model as stock transformers loads it, and the logits compared with those before (float32; a relative difference
above 1e-4 counts as changed).

{counts}; {having} of the unchanged ones have pairs.
Mixtures of experts are listed here, though `llmq quantize` refuses them for now.

"""


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    count = {
        r: sum(row["result"] == r for row in rows) for r in ("unchanged", "CHANGED", "refused", "fails", "not built")
    }
    having = sum(row["result"] == "unchanged" and row["pairs"] > 0 for row in rows)
    text = HEAD.format(having=having, counts=", ".join(f"{n} {word}" for word, n in count.items()))
    text += "| type | kind | pairs | shiftable | without a pair | logits moved by |\n|---|---|---|---|---|---|\n"
    for row in rows:
        words = f"{row['error']:.1e}" if "error" in row else f"{row['result']}: {row['words'][:120]}".replace("|", "/")
        cells = [row["type"], row.get("kind", ""), row["pairs"], row.get("shiftable", ""), row["rejected"], words]
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text


def main() -> None:
    """The command line."""
    from tiny import TYPES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="these types (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", type=Path, help="write the table (.md) or everything found (.json) here")
    options = parser.parse_args()
    rows = []
    with get_context("spawn").Pool(options.workers, quiet, maxtasksperchild=20) as pool:
        for row in pool.imap(check, options.types or TYPES):
            rows.append(row)
            words = row["words"] or f"{row['pairs']} pairs, {row['rejected']} not, logits {row.get('error', 0):.1e}"
            print(f"{row['result']:9} {row['type']:26} {row.get('seconds', 0):5.1f} s  {words[:160]}", flush=True)
    if options.o:
        page = json.dumps(rows, indent=1) if options.o.suffix == ".json" else table(rows)
        options.o.parent.mkdir(parents=True, exist_ok=True)
        options.o.write_text(page)


if __name__ == "__main__":
    main()
