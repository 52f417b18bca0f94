"""A whole model through llmq.load beside the same in bfloat16: memory after loading, prefill and decode speed.

    python scripts/bench_decode.py --random 1b                       a random Llama, created and quantized by the script
    python scripts/bench_decode.py --random 8b --device cuda --compile
    python scripts/bench_decode.py MODEL --batch 8 --tokens 64

The model is quantized by RTN (4 bits, groups of 128) into --work, and reused next time; --prepare stops after that.
Each model is loaded in a separate process. Resident memory is measured after running one token and reading every
weight; "the model" is the increase over the imports. The processes are timed in turns, and medians are compared; on a
CPU with --threads 1 seconds are of the processor, so that other processes change them less. Decoding is greedy, one
token at a time after a prompt of 16 tokens; --compile also measures torch.compile (a static cache; CUDA graphs on a
GPU). `stock` in --kinds runs the quantized folder through stock transformers. Writes JSON and prints the table last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_timing as timing
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SHAPES = {"1b": "llama-1b", "8b": "llama-3-8b"}
PROMPT = 16
MIB = 1 << 20

Result = dict[str, Any]


class Worker:
    """A separate process with one model; requests and answers are lines of JSON over a pipe."""

    def __init__(self, kind: str, folder: Path, args: argparse.Namespace) -> None:
        told = {name: getattr(args, name) for name in ("device", "dtype", "batch", "prefill", "tokens", "threads")}
        about = json.dumps(told | {"kind": kind, "folder": str(folder)})
        command = [sys.executable, str(HERE / "bench_decode.py"), "--worker", about]
        self.kind = kind
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._read()

    def ask(self, what: str, compiled: bool) -> Result:
        """The result of one run, or a reason. Raises SystemExit if the process has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "compiled": compiled}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.kind} ended with {self.process.wait()}")
        answer: Result = json.loads(line)
        return answer


def work(about: Result) -> None:
    """The process of a `Worker`: load, report the memory, answer requests until the pipe is closed."""
    # Only this file may write to the pipe: a library's output would be read as an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import psutil
    from transformers import AutoConfig, AutoModelForCausalLM

    import llmq
    import llmq.inference.transformers_hook

    if about["threads"]:
        torch.set_num_threads(about["threads"])
    # The model's code is imported before any weight is loaded, so that it does not count as the model's memory.
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(about["folder"]))
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    if about["kind"] == "llmq":
        model: Any = llmq.load(about["folder"], device_map=about["device"], dtype=about["dtype"])
    else:
        dtype = getattr(torch, about["dtype"])
        model = AutoModelForCausalLM.from_pretrained(about["folder"], dtype=dtype, device_map=about["device"])
    model.eval()
    seconds = time.perf_counter() - began
    runner = Runner(model, about)
    with torch.inference_mode():
        touch(model, about["device"])

    def answer(result: Result) -> None:
        memory = {"rss": process.memory_info().rss, "gpu": 0}
        if about["device"] == "cuda":
            memory |= {"gpu": torch.cuda.memory_allocated(), "gpu_peak": torch.cuda.max_memory_allocated()}
        answers.write(json.dumps(result | memory) + "\n")
        answers.flush()

    answer({"before": before, "seconds": seconds})
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer({"seconds": getattr(runner, asked["do"])(asked["compiled"])})
            except Exception as error:  # most likely from a compiler: shown in the table
                answer({"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"})


def touch(model: Any, device: str) -> None:
    """Run one token and read a value of every page of every weight, so that mapped and lazily unpacked weights become
    resident.
    """
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().flatten()[::1024].clone()


class Runner:
    """One model, with the two timed operations."""

    def __init__(self, model: Any, about: Result) -> None:
        from transformers import StaticCache

        self.model, self.about = model, about
        self.cuda = about["device"] == "cuda"
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (about["batch"], about["prefill"]), generator=generator)
        self.ids = ids.to(about["device"])
        # The compiled step needs the same cache object in all runs; it is reset.
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + about["tokens"] + 1)
        self.compiled_prefill = torch.compile(model.__call__, dynamic=False)
        mode = "reduce-overhead" if self.cuda else "default"
        self.compiled_step = torch.compile(model.__call__, dynamic=False, mode=mode)

    def prefill(self, compiled: bool) -> float:
        """Seconds of one forward pass over the prompt."""
        run = self.compiled_prefill if compiled else self.model
        began = self._now()
        logits = run(input_ids=self.ids, use_cache=not compiled, logits_to_keep=1).logits
        seconds = self._now() - began
        self._check(logits)
        return seconds

    def decode(self, compiled: bool) -> float:
        """Seconds for all tokens after the prompt."""
        if compiled:
            self.cache.reset()
        made = self.model(input_ids=self.ids[:, :PROMPT], past_key_values=self.cache if compiled else None)
        cache, token = made.past_key_values, made.logits[:, -1:].argmax(-1)
        run = self.compiled_step if compiled else self.model
        began = self._now()
        for _ in range(self.about["tokens"]):
            if compiled and self.cuda:
                torch.compiler.cudagraph_mark_step_begin()
            logits = run(input_ids=token, past_key_values=cache).logits
            token = logits[:, -1:].argmax(-1)
        seconds = self._now() - began
        self._check(logits)
        return seconds

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda or torch.get_num_threads() > 1 else time.process_time()

    @staticmethod
    def _check(logits: torch.Tensor) -> None:
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the logits are not finite")


def source(args: argparse.Namespace) -> Path:
    """The model's folder; a random model is first written to --work, atomically."""
    if args.model is not None:
        return Path(args.model)
    name = SHAPES[args.random] + (f"-{args.layers}" if args.layers else "")
    folder = args.work / name
    if not folder.exists():
        part = args.work / f"{name}.part"
        command = [sys.executable, str(HERE / "make_random_model.py"), str(part), "--shape", SHAPES[args.random]]
        subprocess.run(command + (["--layers", str(args.layers)] if args.layers else []), check=True)
        part.rename(folder)
    return folder


def quantized(folder: Path, args: argparse.Namespace) -> Path:
    """The folder's 4-bit form in --work."""
    if args.quantized is not None:
        return Path(args.quantized)
    import llmq

    out = args.work / f"{folder.name}-rtn4g128"
    if not (out / "report.json").exists():
        report = llmq.quantize(str(folder), out, llmq.Recipe(methods=("rtn",), scheme=llmq.Scheme(4, 128)))
        print(f"{out}: {report.bits_per_weight:.3f} bits a weight", flush=True)
    return out


def measure(workers: list[Worker], args: argparse.Namespace) -> dict[str, Result]:
    """Run all workers, after a warm-up, in turns. Returns kind → 'prefill', 'decode', … → seconds or a reason."""
    runs = [(what, compiled) for compiled in (False, True)[: 1 + args.compile] for what in ("prefill", "decode")]
    results: dict[str, Result] = {worker.kind: {"loaded": worker.loaded} for worker in workers}
    for what, compiled in runs:
        name = f"{what}, compiled" if compiled else what
        failed = set()
        # Twice if compiled: only the second call records and replays a graph.
        for turn in range(-1 - compiled, args.rounds):
            for worker in workers:
                if worker.kind in failed:
                    continue
                answer = worker.ask(what, compiled)
                result = results[worker.kind].setdefault(name, {"seconds": []})
                if "reason" in answer:
                    failed.add(worker.kind)
                    results[worker.kind][name] = {"reason": answer["reason"]}
                    print(f"{worker.kind}, {name}: {answer['reason']}", flush=True)
                elif turn < 0:
                    result.setdefault("first", answer["seconds"])
                else:
                    result["seconds"].append(answer["seconds"])
                results[worker.kind]["after"] = {key: value for key, value in answer.items() if key != "seconds"}
        told = {kind: result[name].get("seconds") for kind, result in results.items()}
        print(
            f"{name}: " + ", ".join(f"{kind} {statistics.median(s):.3g} s" for kind, s in told.items() if s), flush=True
        )
    return results


def table(results: dict[str, Result], args: argparse.Namespace) -> Table:
    """Memory and tokens per second, and their ratios to the first kind."""
    kinds = list(results)
    made = Table("", *kinds, *(f"{kind} / {kinds[0]}" for kind in kinds[1:]))
    resident = [results[kind]["loaded"]["rss"] for kind in kinds]
    memory = {
        "resident, loaded": resident,
        "of these, the model": [
            size - results[kind]["loaded"]["before"] for size, kind in zip(resident, kinds, strict=True)
        ],
        "resident, after running": [results[kind]["after"]["rss"] for kind in kinds],
    }
    if args.device == "cuda":
        memory["GPU, loaded"] = [results[kind]["loaded"]["gpu"] for kind in kinds]
        memory["GPU, at most"] = [results[kind]["after"]["gpu_peak"] for kind in kinds]
    for title, sizes in memory.items():
        ratios = [f"{size / sizes[0]:.3f}" for size in sizes[1:]]
        made.add_row(f"MiB {title}", *(f"{size / MIB:.0f}" for size in sizes), *ratios)
    for name in [name for name in results[kinds[0]] if name.startswith(("prefill", "decode"))]:
        tokens = args.batch * (args.prefill if name.startswith("prefill") else args.tokens)
        speeds = []
        for kind in kinds:
            seconds = results[kind][name].get("seconds")
            speeds.append(tokens / statistics.median(seconds) if seconds else None)
        ratios = ["" if speed is None or speeds[0] is None else f"{speed / speeds[0]:.2f}" for speed in speeds[1:]]
        made.add_row(f"tokens/s {name}", *("failed" if s is None else f"{s:.2f}" for s in speeds), *ratios)
    return made


def main() -> None:
    """Create the folders, start the processes, time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a folder with an unquantized model")
    parser.add_argument("--random", choices=sorted(SHAPES), help="a random model of that size instead")
    parser.add_argument("--layers", type=int, help="of the random model, another number of decoder blocks")
    parser.add_argument("--quantized", type=Path, help="the model's quantized folder, if it is there already")
    parser.add_argument("--work", type=Path, default=Path("build/bench_decode"), help="where folders are kept")
    parser.add_argument("-o", "--out", type=Path, default=Path("build/bench_decode.json"))
    parser.add_argument("--kinds", default="bf16,llmq", help="of bf16, llmq, stock; ratios are to the first")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt whose forward is timed")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in one run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's own choice by default")
    parser.add_argument("--prepare", action="store_true", help="make the folders and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    if (args.model is None) == (args.random is None):
        parser.error("a model's folder, or --random")
    if args.prefill < PROMPT:
        parser.error(f"--prefill must be at least {PROMPT}")
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - {"bf16", "llmq", "stock"}:
        parser.error(f"no kind {unknown.pop()!r}")
    args.work.mkdir(parents=True, exist_ok=True)
    folder = source(args)
    packed = quantized(folder, args) if kinds != ["bf16"] else folder
    if args.prepare:
        return
    device = torch.device(args.device)
    load = timing.busy(device)
    workers: list[Worker] = []
    try:
        for kind in kinds:
            workers.append(Worker(kind, folder if kind == "bf16" else packed, args))
        results = measure(workers, args)
    finally:
        for worker in workers:
            worker.close()
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    about = timing.machine(device) | {"load": load}
    report = {"machine": about, "settings": told, "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    console = Console(width=120)
    if load:
        console.print(load, highlight=False)
    console.print(f"{folder.name}, batch {args.batch}, {about['device']}, torch {about['versions']['torch']}")
    console.print(table(results, args))


if __name__ == "__main__":
    main()
