"""The first minutes on a GPU: is it right, how fast is it, what should be tuned; one command per ten minutes.

    python scripts/gpu_check.py --out $OUT                first ten minutes: right, tests, speed, host, candidates
    python scripts/gpu_check.py --out $OUT --call second  then: experts, a profile, a race check, decoding, quantizing
    python scripts/gpu_check.py --out $OUT --rehearse     without a GPU: every step runs, or says why it cannot

Every step is a process of its own with a time limit; what it prints goes to OUT/<step>.log, what it measures to files
beside it. A short table comes last. A step without which the rest is worthless ends the call: no GPU, operators that
cannot be imported, a wrong product. Nothing needs PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
# Of a machine that is lent with 16 processors.
JOBS = 14
PYTHON = sys.executable
WORKER = str(SCRIPTS / "gpu_check_steps.py")


@dataclass(frozen=True)
class Step:
    """seconds: its limit; command: on a GPU; rehearsal: without one, or the reason why it cannot run there; vital: the
    call ends if it fails.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] | str
    vital: bool = False


def steps(out: Path) -> dict[str, tuple[Step, ...]]:
    """The steps of each call."""
    bench = (PYTHON, str(SCRIPTS / "bench_kernels.py"), "-o", str(out / "kernels.json"))
    pytest = (PYTHON, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider")
    operators = ("--operators", "torch,llmq int,torch int4,gemlite")
    tiny = (
        "--shapes",
        "128x256",
        "--rows",
        "1,16",
        "--seconds",
        ".2",
        "--minutes",
        "1",
        "--operators",
        "torch,llmq int",
    )
    some = ("tests/kernels/test_triton_int.py", "-k", "the_rule_itself or not_served or repeated")
    decode = (PYTHON, str(SCRIPTS / "bench_decode.py"), "--random", "8b", "--layers", "4", "--compile")
    first = (
        Step("facts", 15, (PYTHON, WORKER, "facts"), (PYTHON, WORKER, "facts", "--rehearse"), True),
        Step("right", 110, (PYTHON, WORKER, "right"), (PYTHON, WORKER, "right", "--rehearse"), True),
        Step("tests", 100, (*pytest, "-n", str(JOBS), "-k", "not sample_of"), (*pytest[:3], *some, *pytest[4:])),
        Step("speed", 150, (*bench, "--shapes", "8192", "--minutes", "2.2", *operators), (*bench, *tiny)),
        Step("host", 60, (PYTHON, WORKER, "host"), (PYTHON, WORKER, "host", "--rehearse")),
        Step("candidates", 150, (PYTHON, WORKER, "candidates"), (PYTHON, WORKER, "candidates", "--rehearse")),
    )
    second = (
        Step("facts", 15, (PYTHON, WORKER, "facts"), (PYTHON, WORKER, "facts", "--rehearse"), True),
        Step("experts", 90, (PYTHON, WORKER, "experts"), (PYTHON, WORKER, "experts", "--rehearse")),
        Step("profile", 60, (PYTHON, WORKER, "profile"), (PYTHON, WORKER, "profile", "--rehearse")),
        Step("races", 90, (PYTHON, WORKER, "races"), "compute-sanitizer watches a GPU"),
        Step("decode", 160, (*decode, "--device", "cuda"), "a random 8B model does not fit this machine"),
        Step("quantize", 160, (PYTHON, WORKER, "quantize"), "an 8B shape takes minutes of a GPU, hours of a processor"),
    )
    return {"first": first, "second": second}


def main() -> int:
    """Run a call; returns 1 if a vital step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu_check")))
    parser.add_argument("--call", choices=("first", "second"), default="first")
    parser.add_argument("--rehearse", action="store_true", help="both calls, without a GPU, in small")
    parser.add_argument("--only", nargs="+", help="names of steps; by default all")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    calls = steps(out)
    wanted = [*calls["first"], *calls["second"][1:]] if args.rehearse else [*calls[args.call]]
    wanted = [step for step in wanted if not args.only or step.name in args.only]
    told: list[tuple[str, str, float, int]] = []
    for step in wanted:
        state, seconds = perform(step, out, args.rehearse)
        told.append((step.name, state, seconds, step.seconds))
        print(f"{step.name}: {state} ({seconds:.0f} s)", flush=True)
        if step.vital and state != "ok":
            break
    print(summary(out, told, args.rehearse))
    return 1 if any(state != "ok" and step.vital for step, (_, state, _, _) in zip(wanted, told, strict=False)) else 0


def perform(step: Step, out: Path, rehearse: bool) -> tuple[str, float]:
    """Run a step; its state, and the seconds that it took."""
    command = step.rehearsal if rehearse else step.command
    if isinstance(command, str):
        return f"cannot: {command}", 0.0
    if "-n" in command and importlib.util.find_spec("xdist") is None:
        at = command.index("-n")
        command = (*command[:at], *command[at + 2 :])
    environment = os.environ | {"OUT": str(out), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "eval", "scripts"))
    # In a folder of the call's own, so that what is compiled in one step serves the next.
    environment.setdefault("TRITON_CACHE_DIR", str(out.parent / "triton_cache"))
    if not rehearse:
        environment.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        try:
            limit = 600 if rehearse else step.seconds
            # A session of its own, so that what it has started ends with it, and is not timed beside the next step.
            running = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            code = running.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            return f"stopped after {limit} s", time.monotonic() - began
    state = "ok" if code == 0 else f"failed ({code}): {last_line(out / f'{step.name}.log')}"
    return state, time.monotonic() - began


def last_line(file: Path) -> str:
    """The last line of a log that says something, shortened."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def summary(out: Path, told: list[tuple[str, str, float, int]], rehearse: bool) -> str:
    """The table: every step, and the last lines of those that measure."""
    lines = ["", f"{'step':12} {'limit':>6} {'took':>6}  state"]
    lines += [f"{name:12} {limit:5} s {seconds:4.0f} s  {state[:100]}" for name, state, seconds, limit in told]
    for name in ("right", "host", "candidates"):
        if any(step == name for step, *_ in told) and (out / f"{name}.log").exists():
            kept = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            lines += ["", *[line for line in kept if line.startswith(("= ", "! "))][-16:]]
    if (out / "kernels.json").exists() and any(step == "speed" for step, *_ in told):
        for cell in json.loads((out / "kernels.json").read_text(encoding="utf-8"))["cells"]:
            ours, base = cell["operators"].get("llmq int", {}), cell["operators"]["torch"]
            ratio = f"{ours['ratio']:.2f} times torch" if "ratio" in ours else ours.get("state", "")
            again = f", torch again {base['again_ms'] / base['ms']:.3f}" if "again_ms" in base else ""
            lines.append(f"{'x'.join(map(str, cell['shape']))}, {cell['rows']} rows: {ratio}{again}")
    if rehearse:
        lines += ["", estimate(out)]
    return "\n".join(lines)


def estimate(out: Path) -> str:
    """The device minutes of both calls: each step's limit, and what compiling takes of it."""
    file = out / "compilations.json"
    text = "device minutes at most, by the limits: " + ", ".join(
        f"{call} call {sum(step.seconds for step in some) / 60:.1f}" for call, some in steps(out).items()
    )
    if not file.exists():
        return text
    counts = json.loads(file.read_text(encoding="utf-8"))
    each = counts.pop("seconds_each")
    parts = (f"{name} {count} kernels, {count * each / JOBS:.0f} s" for name, count in counts.items())
    return f"{text}\nof it compiling, {each:.1f} s a kernel here, {JOBS} at once: {'; '.join(parts)}"


if __name__ == "__main__":
    if shutil.which("nvidia-smi") is None and "--rehearse" not in sys.argv and "-h" not in sys.argv[1:2]:
        print("nvidia-smi is not here: is this the GPU machine? (--rehearse runs without one)", file=sys.stderr)
    sys.exit(main())
