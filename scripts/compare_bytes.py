"""Check that a refactoring does not change a byte of what `llmq quantize` writes.

    python scripts/compare_bytes.py b293604
    python scripts/compare_bytes.py v0.1.0 --work /tmp/bytes --only 'w8a8*' '*asymmetric*'

Quantizes two models (`demo` and books8m) by every preset, every method and some overrides, with the code of REV and
with the code of the working tree, each run in a separate process (a fork), and compares the written files: every
safetensors shard, the index, the config, the tokenizer's and the generation files. Every run has one thread, so that
sums do not depend on the machine's load. Hashes of REV's files are cached under --work, so a second comparison takes
half the time. Cases whose bytes are expected to change are listed separately. Exits 1 if any other case differs.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SERVER = Path(__file__).with_name("command_server.py")
EXCLUDED = {"report.json", "report.html", "README.md"}  # they contain times and memory; .llmq/ has the journal
LEARNED = {"signround", "block_qat", "best-2", "best-3", "best-4"}  # these have --iterations
W8 = "--bits 8 --group-size channel"
STATIC = "static activation scales are found differently, on purpose"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "1000",
    "NO_COLOR": "1",
}

# Options that no preset or default uses.
OVERRIDES = f"""
--method gptq --asymmetric
--method hqq --asymmetric
--method rtn --bits 8 --asymmetric
--method awq --asymmetric
--method gptq --group-size channel
--method gptq --bits 3
--method gptq --bits 2 --group-size 64
--method gptq --bits 5 --group-size 32
--method gptq --act-order static --range mse --sweeps 0
--method gptq --act-order none --range minmax
--method rtn --range weighted
--method rtn --range kl
--method awq+gptq
--method gptq --override down_proj=bits:8 --override re:[qkv]_proj=group_size:channel --keep o_proj
--method rtn --group-size 96 --ragged smaller
--method rtn --group-size 96 --ragged channel
--method gptq --calib demo
--method outlier_suppression_plus+gptq {W8} --activations dynamic
--recipe fp8 --activations static
--recipe w8a8 --activations static
--recipe w8a8-smoothquant --activations static
--method outlier_suppression {W8} --activations static
""".strip().splitlines()


@dataclass(frozen=True)
class Case:
    """One command, without the model and the folder."""

    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its options as typed, without the leading dashes, which --only could not parse."""
        return " ".join(self.options).removeprefix("--method ").removeprefix("--")

    @property
    def expected(self) -> str:
        """Why its bytes may change; empty if they must not."""
        return STATIC if ("--activations", "static") in pairwise(self.options) else ""


@dataclass(frozen=True)
class Tree:
    """One version of the code, unpacked in a folder."""

    label: str
    folder: Path

    def start(self) -> subprocess.Popen[str]:
        """Start a command server, which checks that all its code is from this tree."""
        entry = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]["scripts"]["llmq"]
        path = os.pathsep.join(str(self.folder / part) for part in ("", "kernels", "eval"))
        return subprocess.Popen(
            [sys.executable, "-P", str(SERVER), str(self.folder), entry],
            cwd=self.folder,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


class Worker:
    """The processes of one thread, one per tree."""

    def __init__(self) -> None:
        self.servers: dict[Tree, subprocess.Popen[str]] = {}

    def run(self, tree: Tree, words: list[str], log: Path, again: bool = True) -> tuple[int, str]:
        """The exit code of one command, and its whole output. A killed command is run once more."""
        if tree not in self.servers:
            self.servers[tree] = tree.start()
        server = self.servers[tree]
        assert server.stdin and server.stdout
        print(json.dumps([words, str(log)]), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        if not answer:
            del self.servers[tree]
            if server.wait() < 0 and again:
                return self.run(tree, words, log, again=False)
            sys.exit(f"llmq of {tree.label} ({tree.folder}) ended with code {server.returncode}: see above")
        return int(answer), log.read_text()

    def stop(self) -> None:
        """Stop all processes."""
        for server in self.servers.values():
            server.communicate()


def listed(worker: Worker, tree: Tree, what: str, scratch: Path) -> list[str]:
    """The names of a tree's recipes or methods, from its own command's output."""
    code, printed = worker.run(tree, [what], scratch / "listed")
    if code:
        sys.exit(f"`llmq {what}` of {tree.label} failed:\n{printed}")
    words = re.findall(r"^([\w-]+) ", printed, flags=re.MULTILINE)  # wide enough that nothing wraps
    return [word for word in words if word != "recipe"]  # the table's heading


def unpacked(revision: str, work: Path) -> Tree:
    """The code of a commit, without history, by `git archive`, which needs no branch or worktree."""
    ask = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True
    )
    if ask.returncode:
        sys.exit(f"{revision} is not a commit of {ROOT}")
    commit = ask.stdout.strip()[:12]
    folder = work / f"tree-{commit}"
    if not folder.exists():
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
        half = Path(tempfile.mkdtemp(dir=work))
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(half, filter="data")
        half.rename(folder)
    return Tree(commit, folder)


def cases_of(recipes: list[str], methods: list[str], iterations: int) -> list[Case]:
    """Every recipe, every method, and the overrides."""

    def case(kind: str, name: str) -> Case:
        return Case((f"--{kind}", name, *(("--iterations", str(iterations)) if name in LEARNED else ())))

    every = [case("recipe", name) for name in recipes] + [case("method", name) for name in methods]
    return every + [Case(tuple(options.split())) for options in OVERRIDES]


def digest(data: bytes) -> str:
    """A shortened hash of a file."""
    return hashlib.sha256(data).hexdigest()[:24]


def tensors(data: bytes) -> dict[str, str]:
    """A safetensors file's tensors (each as a hash of dtype, shape and bytes) and the header's metadata."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    found = {"__metadata__": json.dumps(header.pop("__metadata__", None), sort_keys=True)}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = f"{entry['dtype']} {entry['shape']} {digest(data[begin:end])}"
    return found


def contents(folder: Path) -> dict[str, Any]:
    """The contents of a written folder that must be equal: a hash of every file, the tensors of shards, the config."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in EXCLUDED:
            data = path.read_bytes()
            files[path.name] = {"sha": digest(data)}
            if path.suffix == ".safetensors":
                files[path.name]["tensors"] = tensors(data)
            elif path.name == "config.json":
                files[path.name]["text"] = data.decode()
    return files


def quantized(worker: Worker, tree: Tree, model: str, options: tuple[str, ...], scratch: Path) -> dict[str, Any]:
    """One run: its written contents, or its error message."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        out = Path(place, "out")
        began = time.perf_counter()
        code, printed = worker.run(tree, ["quantize", model, "-o", str(out), *options], Path(place, "log"))
        row: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
        if code:
            words = " ".join(printed.split())
            if "error: " not in words or "Traceback" in words:
                return row | {"failed": printed[-2000:]}
            return row | {"refused": words[words.index("error: ") :].replace(place, "")}
        return row | {"files": contents(out)}


def remembered(
    cache: Path, worker: Worker, tree: Tree, model: str, options: tuple[str, ...], scratch: Path
) -> dict[str, Any]:
    """As `quantized`, from the cache if the same command was run before with the same libraries."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy")}
    key = {"model": model, "options": options, "python": platform.python_version(), **libraries}
    path = cache / f"{digest(json.dumps(key, sort_keys=True).encode())}.json"
    if path.exists():
        row: dict[str, Any] = json.loads(path.read_text())
        return row
    row = quantized(worker, tree, model, options, scratch)
    if "failed" not in row:
        half = path.with_suffix(f".{os.getpid()}")  # two comparisons may fill one cache
        half.write_text(json.dumps({"key": key, **row}))
        half.rename(path)
    return row


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Each difference between two runs in a line: files, and the parts of them that differ."""
    for word in ("failed", "refused"):
        if word in old or word in new:
            if old.get(word) != new.get(word):
                yield f"before {word}: {old.get(word, 'no')}\nnow {word}: {new.get(word, 'no')}"
            elif word == "failed":
                yield f"both failed: {new[word]}"
    was, now = old.get("files", {}), new.get("files", {})
    if not was or not now:
        return
    for name in sorted(was.keys() ^ now.keys()):
        yield f"{name}: only {'before' if name in was else 'now'}"
    for name in sorted(was.keys() & now.keys()):
        if was[name]["sha"] == now[name]["sha"]:
            continue
        before, after = was[name].get("tensors", {}), now[name].get("tensors", {})
        changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
        if changed:
            yield f"{name}: {', '.join(changed)}"
        elif "text" in was[name]:
            lines = set(was[name]["text"].splitlines()) ^ set(now[name]["text"].splitlines())
            yield f"{name}: {'; '.join(sorted(line.strip() for line in lines))}"
        else:
            yield f"{name}: " + ("the same tensors, another order or header" if before else "other bytes")


@dataclass
class Verdict:
    """One row of the table."""

    model: str
    case: str
    result: str  # equal, refused by both, differs as expected, DIFFERS
    seconds: float
    differences: list[str]


def judge(model: str, case: Case, old: dict[str, Any], new: dict[str, Any]) -> Verdict:
    """The verdict on the two runs of a case."""
    found = list(differences(old, new))
    result = "equal" if "files" in new else "both refuse"
    if found:
        # A static scale, or a file with one, may change; but a run must not newly fail or be refused.
        expected = bool(case.expected) and "files" in old and "files" in new
        result = "differs, as expected" if expected else "DIFFERS"
    return Verdict(model, case.name, result, new["seconds"], found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="b293604", metavar="REV", help="the commit before")
    parser.add_argument("--work", type=Path, help="folder for REV's tree and hashes; temporary by default")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="holds models/ and data/")
    parser.add_argument(
        "--only", nargs="+", metavar="GLOB", default=["*"], help="cases whose name matches one of these"
    )
    parser.add_argument("--models", nargs="+", default=["demo", "books8m"], choices=["demo", "books8m"])
    parser.add_argument(
        "--iterations", type=int, default=20, help="steps of signround, as the default 300 would take hours"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--baseline", action="store_true", help="only fill the cache with REV's results")
    parser.add_argument("-o", type=Path, help="write all verdicts here, as JSON")
    args = parser.parse_args()
    shared = args.shared.resolve()
    text = shared / "data" / "books" / "calibration.txt"
    if not text.exists():
        parser.error(f"{text} is missing: --shared FOLDER says where models and texts are")
    places = {"demo": "demo", "books8m": str(shared / "models" / "books8m")}
    # Redirected output has 80 columns, which would truncate the names of cases.
    console = Console(width=None if sys.stdout.isatty() else 160)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.workers) as pool:
        scratch = Path(temporary)
        work: Path = (args.work or scratch).resolve()
        work.mkdir(parents=True, exist_ok=True)
        before, now = unpacked(args.revision, work), Tree("the present tree", ROOT)
        cache = work / "cache" / before.label
        cache.mkdir(parents=True, exist_ok=True)
        workers = [Worker() for _ in range(args.workers)]
        recipes, methods = (listed(workers[0], before, what, scratch) for what in ("recipes", "methods"))
        cases = [
            case
            for case in cases_of(recipes, methods, args.iterations)
            if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.only)
        ]
        console.print(f"{before.label} and {now.label} ({ROOT}), {len(cases)} cases on {', '.join(args.models)}")
        console.print(
            f"calibration: {text}, 8 windows of 256 tokens, for both models; one thread (OMP_NUM_THREADS=1), "
            f"{args.workers} at a time; signround with {args.iterations} steps\n"
            f"left out, because they hold times: {', '.join(sorted(EXCLUDED))}, .llmq/",
            highlight=False,
        )
        began = time.perf_counter()
        idle = queue.SimpleQueue[Worker]()
        for worker in workers:
            idle.put(worker)

        def compared(model: str, case: Case) -> Verdict:
            worker = idle.get()
            try:
                given = () if "--calib" in case.options else ("--calib", str(text))
                options = (*case.options, *given, "--samples", "8", "--seqlen", "256")
                old = remembered(cache, worker, before, places[model], options, scratch)
                new = old if args.baseline else quantized(worker, now, places[model], options, scratch)
            finally:
                idle.put(worker)
            verdict = judge(model, case, old, new)
            print(f"{model} {case.name}: {verdict.result}, {verdict.seconds:.0f} s", file=sys.stderr, flush=True)
            return verdict

        jobs = [pool.submit(compared, model, case) for model in args.models for case in cases]
        verdicts = [job.result() for job in jobs]
        for worker in workers:
            worker.stop()

    if args.o:
        args.o.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    table = Table("model", "case", "verdict", "seconds", "what differs")
    for v in verdicts:
        first = v.differences[0][:100] if v.differences else ""
        more = f" … and {len(v.differences) - 1} more, below" if len(v.differences) > 1 else ""
        table.add_row(v.model, v.case, v.result, f"{v.seconds:.0f}", escape(first + more))
    console.print(table)
    for v in verdicts:
        if v.differences:
            console.print(
                f"\n{v.model}, {v.case}: {v.result}", *v.differences, sep="\n  ", highlight=False, markup=False
            )
    for case in cases:
        if case.expected:
            console.print(f"may differ: {case.name}: {case.expected}", highlight=False)
    count = {word: sum(v.result == word for v in verdicts) for word in dict.fromkeys(v.result for v in verdicts)}
    console.print(", ".join(f"{n} {word}" for word, n in count.items()), f"in {time.perf_counter() - began:.0f} s")
    sys.exit(int(any(v.result == "DIFFERS" or any("failed" in d for d in v.differences) for v in verdicts)))


if __name__ == "__main__":
    main()
