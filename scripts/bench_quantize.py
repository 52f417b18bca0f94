"""Time and memory of `llmq quantize`, compared with only reading the source's bytes and writing the result's bytes.

    python scripts/make_random_model.py /tmp/7b --shape llama-2-7b
    python scripts/bench_quantize.py /tmp/7b -o /tmp/7b-w4 --method rtn
    python scripts/bench_quantize.py /tmp/7b -o /tmp/7b-w4 --method gptq --samples 4 --seqlen 256

Everything after -o OUT goes to `llmq quantize`; OUT is deleted before and after the run. The peak is the largest
resident size of the process. Prints one line at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

PIECE = 1 << 24


def copy_time(source: Path, size: int, out: Path) -> float:
    """Seconds to read every shard of the source and write `size` bytes, synced."""
    began = time.perf_counter()
    last = b"\0" * PIECE
    for shard in sorted(source.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                last = piece
    with out.open("wb", buffering=0) as file:
        while size > 0:
            size -= file.write(last[:size]) if last else size
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def main() -> None:
    """One run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args, options = parser.parse_known_args()
    shutil.rmtree(args.out, ignore_errors=True)
    command = [sys.executable, "-m", "llmq.cli", "quantize", str(args.model), "-o", str(args.out), *options]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    report = json.loads((args.out / "report.json").read_text())
    shutil.rmtree(args.out)
    copied = copy_time(args.model, report["bytes"], args.out.with_suffix(".copy"))
    predicted = report["predicted_memory"]
    print(
        f"{' '.join(options)}: {seconds:.0f} s, {seconds / copied:.1f} x "
        f"reading {report['source_bytes'] / 2**30:.2f} GiB "
        f"and writing {report['bytes'] / 2**30:.2f} GiB ({copied:.0f} s); peak {peak / 2**30:.2f} GiB, "
        f"predicted {predicted / 2**30:.2f} ({100 * (predicted / peak - 1):+.0f} %)"
    )


if __name__ == "__main__":
    main()
