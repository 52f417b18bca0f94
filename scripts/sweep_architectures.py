"""Try every causal-LM type of transformers, and every type that reads images or sounds beside text, on a tiny random
checkpoint, and write docs/architectures.md.

For each type: create it, compare discovery with an ordinary forward pass, quantize it to 4 bits with GPTQ, load the
result with stock transformers, and compare its logits with those of the source model with llmq's weights from memory;
of a type that reads images also those of an image and text, and what is copied. Results are kept in a JSON file, so
that `--failed` or `--only TYPE` runs only those types. A type that reads images is named image:TYPE here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "architectures")]

RESULTS = ("works", "refused", "not built", "fails")
HEAD = """# Architectures

Every causal-LM type of transformers {version}, as a tiny random checkpoint.
This page is written by `scripts/sweep_architectures.py`.

**works**: the plan was made, GPTQ wrote 4-bit weights (group size 32, one scale per row where 32 does not divide the
width), stock transformers loaded the result, and its logits were those of llmq's weights in memory (relative error at
most 1e-3, float32). Before that, discovery was compared with an ordinary forward pass: it found as many blocks
as the configuration has layers, each block run alone gave the same output, and no Linear called in a block was missed.
With `--loader llmq`, which types need whose checkpoints store all experts in one tensor, `llmq.load` loaded the result,
and stock transformers refused it.
**refused**: `llmq plan` refuses it before any work. **fails**: anything else.
**not built**: transformers could not make a tiny model of the type.
*corrected, for a stream*: how many weights were quantized in the order of their use, and corrected for the errors of
earlier ones in their inputs; and how many of them also for those in the residual stream that their output is added to.
That number is 0 where a norm, a gate or a product stands between each output and its stream, and where the weights
that add to a stream are left alone. Routed experts are not corrected.

{counts}

| type | kind | blocks | quantized of 2-D block weights | corrected, for a stream | result |
|---|---|---|---|---|---|
"""

#: Before the name of a type that reads images, which may be a causal-LM type, too.
VISION = "image:"
VISION_HEAD = """
## Types that read images or sounds

Every type of `AutoModelForImageTextToText`, then those of `AutoModelForMultimodalLM` that are not among them, each as
a tiny random checkpoint of the class that its config.json names, with its vision tower.

**works**: as above (with text, 4 bits), and: that class loaded the result, and missed and refused nothing that it does
not miss in the source; every tensor outside the quantized weights was the source's, bit for bit; and the logits of
text, and of one image and text, were those of the source with llmq's weights (relative error at most 1e-3, float32; the
column *errors* has both, 0 where they are equal, one number for types that no image was given to).

{counts}

| type | class | kind | blocks | quantized of 2-D block weights | tensors copied | errors | result |
|---|---|---|---|---|---|---|---|
"""

#: Where what is raised does not say why.
WHY = {
    "dots3_note": "its vision tower has experts that are stored one by one, which transformers does not join in a "
    "quantized folder",
    "ernie4_5_vl_moe": "transformers makes the experts for text and those for images of the same stored tensors",
}


def check_vision(name: str) -> dict[str, Any]:
    """Check one type that reads images or sounds; returns its row of the second table."""
    import checks
    import checks_vision
    import tiny
    import tiny_vision
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    import llmq

    kind = tiny_vision.kind(name)
    row: dict[str, Any] = {"type": VISION + name, "class": kind.__name__, "kind": "", "blocks": "", "share": ""}
    row |= {"copied": "", "result": "not built", "words": ""}
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        windows, ids = tiny.tokens(8, 64, seed=2), tiny.tokens()
        try:
            tiny_vision.make(name, source)
            real, told = checks_vision.stock(kind, source)
        except Exception as error:  # a model's code may raise anything
            return row | {"words": first_line(error).replace(str(source), "the source")}
        if lost := sorted(told["missing_keys"]):
            words = f"transformers does not find {len(lost)} weights in what it saved itself, {lost[0]} among them"
            return row | {"words": words}
        row["kind"] = "experts" if checks.is_mixture(real) else "dense"
        loader = "any"
        try:
            if name not in CAUSAL:  # of those the first table tells
                structure, faults = checks.faults(source, ids, kind=kind)
                row["blocks"] = len(structure.blocks)
                if faults:
                    return row | {"result": "fails", "words": "discovery: " + "; ".join(faults[:3])}
            try:
                done = checks_vision.quantized(name, source, out, windows, ids)
            except llmq.LlmqError as error:
                if "--loader llmq" not in str(error):
                    raise
                loader = row["loader"] = "llmq"
                done = checks_vision.quantized(name, source, out, windows, ids, loader)
        except llmq.LlmqError as error:
            return row | {"result": "refused", "words": str(error).replace(str(source), "the source")}
        except Exception as error:  # shown in the table; the other types continue
            return row | {"result": "fails", "words": first_line(error).replace(str(source), "the source")}
    row |= {"share": done.share, "text": done.text, "image": done.image, "moved": done.moved, "seeing": done.seeing}
    row |= {"copied": len(done.copied), "blocks": done.blocks}
    faults = done.faults
    if not done.text <= 1e-3:
        faults.append(f"logits of text {done.text:.1e} apart after loading")
    if done.image is not None and not done.image <= 1e-3:
        faults.append(f"logits of an image and text {done.image:.1e} apart after loading")
    if faults:
        return row | {"result": "fails", "words": "; ".join(faults)}
    return row | {"result": "works", "words": "; ".join(done.left)}


def check(name: str) -> dict[str, Any]:
    """Check one type; returns its row of the table."""
    if name.startswith(VISION):
        return check_vision(name.removeprefix(VISION))
    import checks
    import tiny
    import torch

    import llmq

    row: dict[str, Any] = {"type": name, "kind": "", "blocks": "", "share": "", "result": "not built", "words": ""}
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "out")
        try:
            tiny.make(name, source)
            real = checks.stock(source)
            before = checks.logits(real, tiny.tokens())
        except Exception as error:  # a model's code may raise anything
            return row | {"words": first_line(error)}
        row["kind"] = "experts" if checks.is_mixture(real) else "dense"
        if not bool(torch.isfinite(before).all()):
            return row | {"words": "its logits are not finite"}
        try:
            structure, faults = checks.faults(source, tiny.tokens())
            row["blocks"] = len(structure.blocks)
            if faults:
                return row | {"result": "fails", "words": "discovery: " + "; ".join(faults[:3])}
            try:
                done = checks.quantized(source, out, tiny.tokens(8, 64, seed=2), tiny.tokens())
            except llmq.LlmqError as error:
                if "--loader llmq" not in str(error):
                    raise
                done = checks.quantized(source, out, tiny.tokens(8, 64, seed=2), tiny.tokens(), loader="llmq")
                row["loader"] = "llmq"
        except llmq.LlmqError as error:
            return row | {"result": "refused", "words": str(error)}
        except Exception as error:  # shown in the table; the other types continue
            return row | {"result": "fails", "words": first_line(error)}
    row |= {"share": done.share, "corrected": done.corrected, "error": done.error, "moved": done.moved}
    if not done.error <= 1e-3:
        return row | {"result": "fails", "words": f"logits {done.error:.1e} apart after loading"}
    return row | {"result": "works", "words": "; ".join(done.left)}


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def serve(pipe: Connection) -> None:
    """A worker: receives type names, sends rows. Its standard error (progress bars and warnings) is discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe.send("ready")
    while True:
        pipe.send(check(pipe.recv()))


class Worker:
    """A process that checks one type after another, and is restarted if it hangs or dies."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start a new process, which imports all modules."""
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def check(self, name: str, limit: float) -> dict[str, Any]:
        """The row of one type, within `limit` seconds."""
        row = {"type": name, "class": "", "kind": "", "blocks": "", "share": "", "copied": "", "result": "fails"}
        try:
            self.pipe.send(name)
            if self.pipe.poll(limit):
                answer: dict[str, Any] = self.pipe.recv()
                return answer
            words = f"no result within {limit:.0f} s"
        except (EOFError, OSError):
            words = "the process died"
        self.process.kill()
        self.process.join()
        self.start()
        return row | {"words": words}


def sweep(names: list[str], workers: int, limit: float, rows: dict[str, dict[str, Any]], cache: Path) -> None:
    """Check the types on a few processes; each row is saved as soon as it is finished."""
    todo, lock = list(reversed(names)), threading.Lock()

    def work() -> None:
        worker = Worker()
        while True:
            with lock:
                if not todo:
                    worker.process.kill()
                    return
                name = todo.pop()
            began = time.perf_counter()
            row = worker.check(name, limit)
            row["seconds"] = round(time.perf_counter() - began, 1)
            with lock:
                rows[name] = row
                cache.parent.mkdir(parents=True, exist_ok=True)
                cache.write_text(json.dumps(rows, indent=1, sort_keys=True))
                print(f"{row['result']:9} {name:26} {row['seconds']:5.1f} s  {row['words'][:200]}", flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def counted(rows: list[dict[str, Any]], label: str) -> str:
    """One line: how many rows have which result."""
    parts = [f"{sum(r['result'] == x for r in rows)} {x}" for x in RESULTS]
    return f"{len(rows)} {label}: " + ", ".join(p for p in parts if not p.startswith("0 ")) + "."


def result(row: dict[str, Any]) -> str:
    """The last cell of a row."""
    words = " ".join(str(row["words"]).replace("|", "/").split())
    if row["result"] == "works":
        words = re.sub(r"\S+ while loading it", "the stored tensor while loading it", words)
        words = "; ".join(dict.fromkeys(words.split("; ")))
    elif "requires the timm library" in words:
        words = "transformers needs the timm library for its vision tower, which is not installed here"
    elif row["type"].removeprefix(VISION) in WHY and row["type"].startswith(VISION):
        words = f"{WHY[row['type'].removeprefix(VISION)]} ({words})"
    before = "; left alone: " if row["result"] == "works" else ": "
    with_llmq = ", `--loader llmq`" if row.get("loader") else ""
    return f"**{row['result']}**{with_llmq}" + (before + words[:300] if words else "")


def table(rows: list[dict[str, Any]]) -> str:
    """The first part of the page: causal-LM types."""
    import transformers

    labels = {"dense": "dense types", "experts": "mixture-of-experts types", "": "types not built"}
    counts = [counted([r for r in rows if r["kind"] == kind], label) for kind, label in labels.items()]
    text = HEAD.format(version=transformers.__version__, counts="\n".join(counts))
    for row in rows:
        cells = [row["type"], row["kind"], row["blocks"], row["share"], row.get("corrected", ""), result(row)]
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def table_vision(rows: list[dict[str, Any]]) -> str:
    """The second part of the page: types that read images or sounds."""
    from tiny_vision import TYPES

    kinds = {True: [], False: []}  # type: dict[bool, list[dict[str, Any]]]
    for row in rows:
        kinds[row["type"].removeprefix(VISION) in TYPES].append(row)
    images, sounds = kinds[True], kinds[False]
    built = [row for row in images if row["result"] != "not built"]
    share = sum(row["result"] == "works" for row in built) / max(1, len(built))
    alone = sum(row["result"] == "works" and bool(row.get("loader")) for row in images)
    counts = counted(images, "types that read images") + f" Of those that can be built, {share:.0%} work"
    counts += f" ({alone} of them in `llmq.load` alone)."
    text = VISION_HEAD.format(counts=counts + ("\n" + counted(sounds, "others") if sounds else ""))
    for row in rows:
        name, image = row["type"].removeprefix(VISION), row.get("image")
        error = "" if "text" not in row else f"{row['text']:.0e}" + ("" if image is None else f", {image:.0e}")
        cells = (name, row["class"], row["kind"], row["blocks"], row["share"], row["copied"], error, result(row))
        text += "| " + " | ".join(str(cell) for cell in cells) + " |\n"
    return text


def main() -> None:
    """The command line."""
    import tiny
    import tiny_vision

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="TYPE", help="these types")
    parser.add_argument(
        "--failed", action="store_true", help="the types that did not work in the last run, and new ones"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one type")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "architectures.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = json.loads(options.cache.read_text()) if options.cache.exists() else {}
    vision = [VISION + name for name in (*tiny_vision.TYPES, *tiny_vision.OTHERS)]
    names = list(options.only or [*tiny.TYPES, *vision])
    if options.failed:
        names = [n for n in names if rows.get(n, {}).get("result") != "works"]
    began = time.perf_counter()
    sweep(names, options.workers, options.limit, rows, options.cache)
    page = table([rows[n] for n in tiny.TYPES if n in rows]) + table_vision([rows[n] for n in vision if n in rows])
    options.table.write_text(page)
    results = [r["result"] for r in rows.values()]
    print({r: results.count(r) for r in RESULTS}, f"{time.perf_counter() - began:.0f} s, {options.table}")


if __name__ == "__main__":
    main()
