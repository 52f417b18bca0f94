"""Kill a run at random moments, resume it each time, and compare the result with an uninterrupted run, byte for byte.

    python scripts/kill_resume.py --kills 20 demo
    python scripts/kill_resume.py --kills 3 MODEL --group-size 128 --samples 4 --seqlen 256

Everything after MODEL goes to `llmq quantize`. Each kill is SIGKILL after a random fraction of an uninterrupted run's
time; if a run ends before its kill, its result is compared and a new folder is started. The verdict is printed last.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIFFER = {"report.json", "report.html", "README.md"}


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that must not depend on interruptions."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.is_file()
        if p.name not in DIFFER
    }


def main() -> None:
    """An uninterrupted run, then the killed ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("model")
    args, options = parser.parse_known_args()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(dir=args.folder))

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "llmq.cli", "quantize", args.model, "-o", str(out), *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.time()
    if start(root / "whole").wait():
        sys.exit("the unbroken run failed")
    whole = time.time() - began
    want = digests(root / "whole")
    print(f"unbroken: {whole:.1f} s, {len(want)} files", flush=True)
    kills = compared = attempt = 0
    out = root / "broken"
    while kills < args.kills or out.exists():
        process = start(out)
        attempt += 1
        try:
            process.wait(rng.uniform(0, whole) if kills < args.kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            done = len(list(out.glob("model-*.safetensors")))
            print(f"kill {kills}: {done} shards written", flush=True)
            continue
        if process.returncode:
            sys.exit(f"attempt {attempt} ended with code {process.returncode}")
        if digests(out) != want:
            sys.exit(f"attempt {attempt}: the result differs from the unbroken run's")
        compared += 1
        shutil.rmtree(out)
    shutil.rmtree(root)
    print(f"{kills} kills, {compared} finished runs, all byte-identical to the unbroken one")


if __name__ == "__main__":
    main()
