"""The steps of gpu_check.py that are not other scripts; each a function, run as `gpu_check_steps.py NAME`.

With --rehearse a step runs in small on a CPU, in Triton's interpreter where it multiplies.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OUT = Path(os.environ.get("OUT", "build/gpu_check"))
REHEARSE = "--rehearse" in sys.argv
if REHEARSE and "candidates" not in sys.argv and "host" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402  (after the variable that Triton reads on import)
from torch import Tensor  # noqa: E402

DEVICE = torch.device("cpu" if REHEARSE else "cuda")
JOBS = 2 if REHEARSE else 14
# 8192 and 4096 wide, and one of which no tile divides anything.
SHAPES = ((64, 256), (33, 200)) if REHEARSE else ((8192, 8192), (4096, 4096), (1000, 1056))
ROWS = (1, 20) if REHEARSE else (1, 8, 16, 32, 64, 100, 128, 256, 512)
KINDS = ((4, 128, False, "bfloat16"), (4, 128, True, "float16"), (4, 32, True, "bfloat16"), (4, 64, False, "float16"))
RARE = ((2, 128, True, "bfloat16"), (3, 128, False, "bfloat16"), (8, 128, False, "bfloat16"))
GOALS = (1, 16, 64, 256)
REPEATS = 2 if REHEARSE else 50


def facts() -> int:
    """What is here: versions, clocks, power; fails unless our operators can be imported and there is a GPU."""
    import bench_gpu
    import bench_timing

    import llmq_kernels.ops  # noqa: F401
    from llmq_kernels.backend import triton_refusal
    from llmq_kernels.triton.gpu import gpu_of

    told: dict[str, Any] = {"clocks": bench_gpu.clocks(), "rehearsal": REHEARSE}
    if not REHEARSE and (not torch.cuda.is_available() or triton_refusal(DEVICE)):
        print(f"no GPU that Triton's kernels run on: {triton_refusal(DEVICE)}")
        return 1
    told |= {"machine": bench_timing.machine(DEVICE), "gpu": str(gpu_of(DEVICE))}
    if not REHEARSE:
        query = ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"]
        told["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True).stdout
    (OUT / "facts.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in told.items() if key != "nvidia-smi"}, indent=1))
    return 0


def right() -> int:
    """Every configuration that the rule reaches here against a float32 product; fails if one is wrong."""
    jobs = [(shape, rows, kind) for kind in KINDS for shape in SHAPES for rows in ROWS]
    jobs += [(SHAPES[1], rows, kind) for kind in RARE for rows in ROWS]
    count_compilations()
    with multiprocessing.get_context("spawn").Pool(JOBS) as pool:
        wrong = [line for line in pool.imap_unordered(_right, jobs, chunksize=4) if line]
    for line in sorted(wrong):
        print("! " + line)
    print(f"= {len(jobs)} products, {REPEATS} times each: {len(wrong)} wrong")
    return 2 if wrong else 0


def _weight(shape: tuple[int, int], kind: tuple[int, int, bool, str], device: torch.device) -> Any:
    from llmq_kernels.int_linear import planes
    from llmq_kernels.weights import PackedInt

    bits, group, zeros, name = kind
    (n, k), dtype = shape, getattr(torch, name)
    groups, words = -(-k // group), -(-k // planes.TILE[bits]) * planes.WORDS[bits]
    generator = torch.Generator(device).manual_seed(n + bits)
    packed = torch.randint(-32768, 32768, (n, words), dtype=torch.int16, device=device, generator=generator)
    scale = (torch.rand(groups, n, device=device, generator=generator) * 0.02 - 0.005).to(dtype)
    half = 1 << (bits - 1)
    zero = (
        torch.randint(-half, half, (groups, n), dtype=torch.int8, device=device, generator=generator) if zeros else None
    )
    return PackedInt(packed, scale, zero, bits, n, k, group)


def _right(job: tuple[tuple[int, int], int, tuple[int, int, bool, str]]) -> str:
    """What is wrong with a product, or nothing. Memory that outputs get is filled with NaN before."""
    from llmq_kernels.int_linear import planes
    from llmq_kernels.triton import gpu, tables

    shape, rows, kind = job
    weight, dtype = _weight(shape, kind, DEVICE), getattr(torch, kind[3])
    found = gpu.gpu_of(DEVICE)
    config = tables.choose(found, kind[0], rows, *shape, kind[1], kind[2], dtype)
    x = torch.randn(rows, shape[1], device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(rows)).to(dtype)
    bias = torch.linspace(-1, 1, shape[0], device=DEVICE).to(dtype)
    name = f"{shape[0]}x{shape[1]}, {rows} rows, {kind}: {config}"
    expected = x.float() @ planes.dequantize(weight, torch.float32).t() + bias.float()
    first: Tensor | None = None
    for _ in range(REPEATS):
        for dirty in (dtype, torch.float32):
            torch.full((max(config.programs_k, 1), rows, shape[0]), math.nan, dtype=dirty, device=DEVICE)
        try:
            y = planes.run(x, weight, bias, config, found.backend)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
            return f"{name}: {type(error).__name__}: {str(error)[:200]}"
        if first is None:
            first = y
            gap = (y.float() - expected).norm() / expected.norm()
            worst = (y.float() - expected).abs().max() / expected.square().mean().sqrt()
            if not float(gap) <= 0.02 or not float(worst) <= 0.1:
                return f"{name}: off by {float(gap):.3g}, at worst {float(worst):.3g}"
        elif not torch.equal(y, first):
            return f"{name}: not the same twice"
    return ""


def count_compilations() -> None:
    """Write how many kernels the steps compile: what the rule reaches for the products of `right`, and candidates."""
    from llmq_kernels import tune
    from llmq_kernels.triton.gpu import KNOWN, gpu_of
    from llmq_kernels.triton.rule import rule
    from llmq_kernels.triton.variants import product

    gpu = KNOWN[2] if REHEARSE else gpu_of(DEVICE)
    shapes = ((8192, 8192), (4096, 4096), (1000, 1056))
    rows = (1, 8, 16, 32, 64, 100, 128, 256, 512)
    every, tuned = set(), set()

    def code(config: Any, kind: tuple[int, int, bool, str], m: int, shape: tuple[int, int]) -> str:
        dtype = getattr(torch, kind[3])
        made = product(config, kind[0], m, *shape, kind[1], kind[2], dtype, gpu.backend, True)
        divisible = [size % 16 for size in shape]
        return f"{kind} {made.kernel.__name__} {made.constexprs} {made.options} {divisible}"

    for kind, some in ((kind, shapes) for kind in KINDS + RARE):
        for shape in some if kind in KINDS else shapes[1:2]:
            for m in rows:
                config = rule(gpu, kind[0], m, *shape, kind[1])
                if config.family != "dense":
                    every.add(code(config, kind, m, shape))
    for m in GOALS:
        for config in tune.candidates(gpu, 4, m, 8192, 8192, 128):
            if config.family != "dense":
                tuned.add(code(config, KINDS[0], m, (8192, 8192)))
    counts = {"right": len(every), "candidates": len(tuned)}
    file = OUT / "compilations.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"seconds_each": 2.0}
    file.write_text(json.dumps(before | counts) + "\n", encoding="utf-8")


def host() -> int:
    """Microseconds of host time: bench_host.py's table, and a block of three layers eager, compiled, as a graph."""
    command = [sys.executable, str(Path(__file__).parent / "bench_host.py"), "--rounds", "1"]
    done = subprocess.run([*command, "--device", DEVICE.type], capture_output=True, text=True)
    print("\n".join("= " + line for line in done.stdout.splitlines()) if done.returncode == 0 else done.stderr)
    if REHEARSE:
        print("= a graph and a compiled block need a GPU")
        return done.returncode
    from llmq.formats.plain import IntWeight
    from llmq.inference.linear import quant_linear

    def layer() -> torch.nn.Module:
        words = torch.randint(-(1 << 31), 1 << 31, (4096, 512), device=DEVICE).to(torch.int32)
        scale = torch.full((4096, 32), 0.01, dtype=torch.bfloat16, device=DEVICE)
        return quant_linear(IntWeight(words, scale, None, 4, 4096, 128), None, torch.bfloat16)

    block = torch.nn.Sequential(layer(), torch.nn.SiLU(), layer(), torch.nn.SiLU(), layer())
    x = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(block, fullgraph=True)
        for name, call in (("eager", block), ("compiled", compiled)):
            print(f"= a block of three, {name}: {_wall(lambda call=call: call(x)):.1f} µs a call")
        graph = torch.cuda.CUDAGraph()
        block(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            block(x)
        print(f"= a block of three, a graph: {_wall(graph.replay):.1f} µs a call")
    return done.returncode


def _wall(call: Any, count: int = 300) -> float:
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / count


def candidates() -> int:
    """The candidates of each goal's rows at 8192 x 8192, compiled at once, measured one after another."""
    from llmq_kernels import tune
    from llmq_kernels.triton.gpu import KNOWN, gpu_of

    gpu = KNOWN[2] if REHEARSE else gpu_of(DEVICE)
    wanted = [
        (config, 4, m, 8192, 8192, 128, False, "bfloat16")
        for m in (GOALS[-1:] if REHEARSE else GOALS)
        for config in tune.candidates(gpu, 4, m, 8192, 8192, 128)
        if config.family != "dense"
    ]
    began = time.monotonic()
    failed = tune.compile_all(wanted, gpu, JOBS)
    took = time.monotonic() - began
    print(f"= {len(set(wanted))} candidates compiled in {took:.0f} s, {failed} of them cannot be")
    if REHEARSE:
        file = OUT / "compilations.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        each = {"seconds_each": took * JOBS / len(set(wanted))}
        file.write_text(json.dumps(before | each) + "\n", encoding="utf-8")
        print("= measuring them needs a GPU")
        return 0
    every = {}
    for m in GOALS:
        times = sorted(tune.measure(gpu, DEVICE, 4, m, 8192, 8192, 128), key=lambda pair: pair[0])
        every[m] = [{"microseconds": best, "config": str(config)} for best, config in times]
        (OUT / "candidates.json").write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
        for best, config in times[:3]:
            print(f"= {m} rows: {best:.1f} µs {config}")
    return 0


def experts() -> int:
    """Products of stacked experts against float32 ones, a graph of one with another routing, and how fast they are."""
    from dataclasses import replace

    from llmq_kernels.grouped_int_linear.route import Routing, sort
    from llmq_kernels.int_linear import planes

    count, shape, choices = (3, SHAPES[1], 2) if REHEARSE else (64, (1536, 2048), 8)
    ones = [_weight(shape, KINDS[0], DEVICE) for _ in range(count)]
    parts = {name: torch.stack([getattr(one, name) for one in ones]) for name in ("packed", "scale")}
    weight, dtype = replace(ones[0], **parts), getattr(torch, KINDS[0][3])
    dense = planes.dequantize(weight, torch.float32)
    generator, wrong = torch.Generator(DEVICE).manual_seed(0), 0

    def draw(tokens: int) -> tuple[Tensor, Tensor]:
        scores = torch.rand(tokens, count, device=DEVICE, generator=generator)
        return torch.randn(tokens, shape[1], device=DEVICE, generator=generator).to(dtype), scores.topk(choices).indices

    def gap(y: Tensor, x: Tensor, expert: Tensor) -> float:
        wanted = torch.zeros(y.shape, device=DEVICE)
        for e in range(count):
            wanted[expert == e] = x[expert == e].float() @ dense[e].t()
        return float((y.float() - wanted).norm() / wanted.norm())

    for tokens in (1, 7) if REHEARSE else (1, 4, 32, 256, 2048, 16384):
        x, chosen = draw(tokens)
        order, offs = sort(chosen, count)
        rows, expert = x[order // choices], chosen.view(-1)[order]
        pairs = planes.linear(x, weight, None, Routing(chosen=chosen)) if tokens <= 32 else None
        gaps = [gap(planes.linear(rows, weight, None, Routing(offs)), rows, expert)]
        gaps += [] if pairs is None else [gap(pairs[order], rows, expert)]
        wrong += sum(not one <= 0.02 for one in gaps)
        line = f"= {tokens} tokens, {choices} of {count} experts: off by {', '.join(f'{one:.2g}' for one in gaps)}"
        if not REHEARSE:
            half = dense.to(dtype).transpose(1, 2)
            times = {"sorted": _wall(lambda r=rows, o=offs: planes.linear(r, weight, None, Routing(o)), 50)}
            if pairs is not None:
                times["pairs"] = _wall(lambda x=x, c=chosen: planes.linear(x, weight, None, Routing(chosen=c)), 50)
            times["dense"] = _wall(lambda r=rows, o=offs, h=half: torch._grouped_mm(r, h, offs=o), 50)
            line += "; µs " + ", ".join(f"{name} {time:.1f}" for name, time in times.items())
        print(line)
    if not REHEARSE:
        wrong += _other_routing(weight, draw, gap, count, choices)
    print(f"= {wrong} wrong")
    return 2 if wrong else 0


def _other_routing(weight: Any, draw: Any, gap: Any, count: int, choices: int) -> int:
    """Whether a captured product is wrong once its rows are routed otherwise."""
    from llmq_kernels.grouped_int_linear.route import Routing, sort
    from llmq_kernels.int_linear import planes

    (x, chosen), (other, again) = draw(32), draw(32)
    order, offs = sort(chosen, count)
    rows, graph = x[order // choices].clone(), torch.cuda.CUDAGraph()
    planes.linear(rows, weight, None, Routing(offs))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = planes.linear(rows, weight, None, Routing(offs))
    order, ends = sort(again, count)
    rows.copy_(other[order // choices])
    offs.copy_(ends)
    graph.replay()
    off = gap(y, rows, again.view(-1)[order])
    print(f"= a graph with another routing: off by {off:.2g}")
    return int(not off <= 0.02)


def profile() -> int:
    """torch's profiler on the chosen kernels at 1, 64 and 256 rows."""
    from torch.profiler import ProfilerActivity

    from llmq_kernels.int_linear import planes

    shape = SHAPES[0]
    weight = _weight(shape, KINDS[0], DEVICE)
    for rows in (1,) if REHEARSE else (1, 64, 256):
        x = torch.randn(rows, shape[1], device=DEVICE).to(torch.bfloat16)
        planes.linear(x, weight, None)
        kinds = [ProfilerActivity.CPU, *([] if REHEARSE else [ProfilerActivity.CUDA])]
        with torch.profiler.profile(activities=kinds) as seen:
            for _ in range(2 if REHEARSE else 50):
                planes.linear(x, weight, None)
        by = "self_cpu_time_total" if REHEARSE else "self_cuda_time_total"
        print(f"= {rows} rows\n{seen.key_averages().table(sort_by=by, row_limit=8)}")
    return 0


def races() -> int:
    """compute-sanitizer's race check at K = 1024, with which it ends in time."""
    import shutil

    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("= compute-sanitizer is not installed here")
        return 0
    code = (
        "import sys; sys.argv.append('x'); import gpu_check_steps as s; import torch\n"
        "from llmq_kernels.int_linear import planes\n"
        "w = s._weight((512, 1024), s.KINDS[0], s.DEVICE)\n"
        "for m in (1, 16, 64, 128): planes.linear(torch.randn(m, 1024, device='cuda').bfloat16(), w, None)\n"
        "torch.cuda.synchronize()"
    )
    command = [tool, "--tool", "racecheck", "--error-exitcode", "9", sys.executable, "-c", code]
    return subprocess.run(command).returncode


def quantize() -> int:
    """GPTQ of two blocks of a random 7B shape, beside reading and writing its bytes (bench_quantize.py)."""
    scripts, model = Path(__file__).parent, OUT.parent / "random_7b"
    make = [sys.executable, str(scripts / "make_random_model.py"), str(model), "--shape", "llama-2-7b", "--layers", "2"]
    if not model.exists() and subprocess.run(make).returncode:
        return 1
    bench = [sys.executable, str(scripts / "bench_quantize.py"), str(model), "-o", str(OUT.parent / "random_7b_w4")]
    return subprocess.run([*bench, "--method", "gptq", "--samples", "8", "--seqlen", "256"]).returncode


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    names = {one.__name__: one for one in (facts, right, host, candidates, experts, profile, races, quantize)}
    sys.exit(names[sys.argv[1]]())
