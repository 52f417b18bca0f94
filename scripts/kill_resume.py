"""Kill a run at random moments, resume it each time, and compare the result with an uninterrupted run, byte for byte.

    python scripts/kill_resume.py --kills 20 demo
    python scripts/kill_resume.py --kills 3 MODEL --group-size 128 --samples 4 --seqlen 256
    python scripts/kill_resume.py --kills 20 --inside 2 MIXTURE --group-size 64 --samples 16 --seqlen 256

Everything after MODEL goes to `llmq quantize`. Each kill is SIGKILL after a random fraction of an uninterrupted run's
time; if a run ends before its kill, its result is compared and a new folder is started. The verdict is printed last.

Each folder's runs have a cache of their own, so that with --target-bits scores are measured, killed and resumed, too;
what they resume from is written every half second here.

With --inside, each kill comes between two commits of experts of one block of a mixture, which are committed in groups
of so few; the moments are spread evenly over all blocks. Each run is resumed until its end, and must say of exactly the
units that were committed that they were already done, and leave their files alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DIFFER = {"report.json", "report.html", "README.md"}
DONE = re.compile(r"^(.*) (?:was|were) already done$", re.MULTILINE)
# llmq, but for the time between snapshots of scores.
OFTEN = """
from llmq.allocation import snapshot
snapshot.EVERY, snapshot.SHARE = 0.5, 0.0
from llmq.cli.app import main
main()
"""
# llmq, but for the size of groups, and progress on stderr although that is no terminal.
IN_GROUPS = """
import sys
from llmq.planning import experts
from llmq.report.progress import Bars
experts.GROUP_EXPERTS = {size}
Bars.step = lambda bars, text: print(text, file=sys.stderr, flush=True)
from llmq.cli.app import main
main()
"""


def cache_of(out: Path) -> Path:
    """The cache of the runs that write a folder."""
    return out.with_name(f"{out.name}-cache")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that must not depend on interruptions."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.is_file()
        if p.name not in DIFFER
    }


class Runs:
    """Starts the same run in any folder. inside: experts per group, None for llmq's own."""

    def __init__(self, model: str, options: list[str], inside: int | None) -> None:
        self.run = ["-c", OFTEN if inside is None else IN_GROUPS.format(size=inside)]
        self.model, self.options = model, options

    def start(self, out: Path, log: Path | None = None) -> subprocess.Popen[bytes]:
        """A process that writes to `out`, and its progress to `log`."""
        command = [sys.executable, *self.run, "quantize", self.model, "-o", str(out), *self.options]
        around = os.environ | {"XDG_CACHE_HOME": str(cache_of(out))}
        if log is None:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=around)
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=around)


def anywhere(runs: Runs, root: Path, kills: int, rng: random.Random) -> str:
    """Kill at random moments, each run again where it was killed. Returns the verdict."""
    began = time.time()
    if runs.start(root / "whole").wait():
        sys.exit("the unbroken run failed")
    whole = time.time() - began
    want = digests(root / "whole")
    print(f"unbroken: {whole:.1f} s, {len(want)} files", flush=True)
    killed = compared = attempt = 0
    out = root / "broken"
    while killed < kills or out.exists() or cache_of(out).exists():
        process = runs.start(out)
        attempt += 1
        try:
            process.wait(rng.uniform(0, whole) if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            done, kept = (
                len(list(out.glob("model-*.safetensors"))),
                [p.name for p in cache_of(out).rglob("*") if p.is_file()],
            )
            print(
                f"kill {killed}: {done} shards written; kept of scores: {', '.join(sorted(kept)) or 'nothing'}",
                flush=True,
            )
            continue
        if process.returncode:
            sys.exit(f"attempt {attempt} ended with code {process.returncode}")
        if digests(out) != want:
            sys.exit(f"attempt {attempt}: the result differs from the unbroken run's")
        compared += 1
        shutil.rmtree(out)
        shutil.rmtree(cache_of(out), ignore_errors=True)
    return f"{killed} kills, {compared} finished runs, all byte-identical to the unbroken one"


def committed(out: Path) -> list[str]:
    """The units in a folder's journal, in order."""
    journal = out / ".llmq" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [entry["unit"] for entry in entries if "unit" in entry]


def commits(process: subprocess.Popen[bytes], out: Path) -> Iterator[list[str]]:
    """The units that are committed, whenever there is one more, until the process ends."""
    known: list[str] = []
    while process.poll() is None:
        now = committed(out)
        if len(now) > len(known):
            yield (known := now)
        time.sleep(0.002)


def times(out: Path) -> dict[str, int]:
    """When each shard was written."""
    return {p.name: p.stat().st_mtime_ns for p in out.glob("model-*.safetensors")}


def inside_blocks(runs: Runs, root: Path, kills: int, rng: random.Random) -> str:
    """Kill between two commits within a block, and resume to the end, each time in a new folder."""
    process, moments = runs.start(root / "whole"), [time.time()]
    for _ in commits(process, root / "whole"):
        moments.append(time.time())
    if process.wait():
        sys.exit("the unbroken run failed")
    units, want = committed(root / "whole"), digests(root / "whole")
    # After these commits a group of experts was the last thing written, and its block is not finished.
    gaps = [number for number, unit in enumerate(units, 1) if ", expert" in unit]
    print(f"unbroken: {moments[-1] - moments[0]:.1f} s, {len(units)} units, {len(gaps)} of experts", flush=True)
    if not gaps or len(moments) <= len(units):
        sys.exit("no commits of experts were seen: is this a mixture, and does each group take a while?")
    killed = tried = 0
    out, log = root / "broken", root / "log"
    while killed < kills:
        tried += 1
        if tried > 3 * kills:
            sys.exit(f"only {killed} of {tried} kills came inside a block")
        aim = gaps[killed * len(gaps) // kills]
        process = runs.start(out)
        for now in commits(process, out):
            if len(now) >= aim:
                time.sleep(rng.uniform(0, 0.8) * (moments[aim + 1] - moments[aim]))
                break
        process.kill()
        process.wait()
        before, written = committed(out), times(out)
        if not before or ", expert" not in before[-1]:
            shutil.rmtree(out)
            continue
        killed += 1
        if runs.start(out, log).wait():
            sys.exit(f"kill {killed}: the run that resumed failed: {log.read_text()}")
        said, blocks = DONE.findall(log.read_text()), [unit for unit in before if unit.startswith("block")]
        if sorted(said) != sorted(blocks):
            sys.exit(f"kill {killed}: {blocks} were committed, but the run that resumed said so of {said}")
        after = times(out)
        kept = {name for name in written if int(name[len("model-") :][:5]) <= len(before)}
        touched = [name for name in sorted(kept) if after.get(name) != written[name]]
        if touched or committed(out) != units or digests(out) != want:
            sys.exit(f"kill {killed}: the result differs from the unbroken run's, or {touched} were written again")
        print(f"kill {killed}: after {before[-1]} ({len(before)} of {len(units)}); went on from there", flush=True)
        shutil.rmtree(out)
    return f"{killed} kills inside blocks, each resumed at the last committed group, all byte-identical"


def main() -> None:
    """An uninterrupted run, then the killed ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--inside", type=int, help="kill inside the blocks of a mixture; experts per group")
    parser.add_argument("model")
    args, options = parser.parse_known_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))
    kill = anywhere if args.inside is None else inside_blocks
    verdict = kill(Runs(args.model, options, args.inside), root, args.kills, random.Random(args.seed))
    shutil.rmtree(root)
    print(verdict)


if __name__ == "__main__":
    main()
