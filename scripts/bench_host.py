"""Microseconds of CPU that a layer costs before its kernel runs, without a GPU: Triton launches into nothing.

    python scripts/bench_host.py                       llmq's IntLinear, a stack of experts and nn.Linear, in turns
    python scripts/bench_host.py --against /tmp/old    the same for another checkout, by its own script, in turns

Kernels are compiled for an H100 and given to a launcher that returns at once, so what is timed is all that Python and
torch do for a call: the module, checks, the operator, Triton's launcher. nn.Linear is timed with one input and one
output feature, whose product costs next to nothing. On a GPU (--device cuda) the launches are real, and calls are not
waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1, 16, 64)
TURNS, CALLS = 15, 200


def fake_gpu() -> None:
    """Make Triton launch into nothing, and llmq take CPU tensors for an H100's."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver
    from triton.runtime import driver

    class Nothing:
        """What a launcher and a driver's tools are to Triton."""

        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, *_: Any) -> None:
            pass

        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    class Fake(GPUDriver):
        """An H100 that does nothing."""

        launcher_cls = Nothing
        utils = Nothing()

        def __init__(self) -> None:
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _: 0

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    driver.set_active(Fake())
    from llmq_kernels import backend
    from llmq_kernels.int_linear import layouts, planes
    from llmq_kernels.triton import gpu

    gpu.gpu_of = lambda _: gpu.KNOWN[2]
    backend.triton_refusal = planes.triton_refusal = lambda _: None
    layouts.choose = lambda *_: ("planes", {})


def microseconds(call: Callable[[], Any]) -> float:
    """Processor time of a call of this thread: the least of TURNS means, for on a shared machine caches are cold."""
    call()
    times = []
    for _ in range(TURNS):
        began = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time() - began) / CALLS)
    return 1e6 * min(times)


def layers(device: str) -> dict[str, float]:
    """Microseconds of a call: llmq's layer by rows of x, without and with zero points, and nn.Linear."""
    import torch

    if device == "cpu":
        fake_gpu()
    from llmq.formats.plain import IntWeight
    from llmq.inference.linear import quant_linear

    found: dict[str, float] = {}
    n, k, group = 4096, 4096, 128
    words = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), dtype=torch.int64).to(torch.int32).to(device)
    scale = torch.full((n, k // group), 0.01, dtype=torch.bfloat16, device=device)
    zero = torch.zeros(n, k // group, dtype=torch.int8, device=device)
    with torch.inference_mode():
        small = torch.nn.Linear(1, 1, bias=False, dtype=torch.float32, device=device)
        one = torch.zeros(1, 1, 1, device=device)
        found["nn.Linear"] = microseconds(lambda: small(one))
        for name, zeros in (("symmetric", None), ("zero points", zero)):
            layer = quant_linear(IntWeight(words, scale, zeros, 4, k, group), None, torch.bfloat16)
            for rows in ROWS:
                x = torch.zeros(1, rows, k, dtype=torch.bfloat16, device=device)
                found[f"IntLinear, {name}, {rows} rows"] = microseconds(lambda layer=layer, x=x: layer(x))
                if device == "cuda":
                    torch.cuda.synchronize()
        found |= experts(device)
    return found


def experts(device: str) -> dict[str, float]:
    """Microseconds of a product of a stack of packed experts: pairs of one token, and sorted rows."""
    import torch

    from llmq.formats.plain import IntWeight
    from llmq.inference.stack import packed_stack
    from llmq_kernels.grouped_int_linear.route import Routing

    count, n, k, group = 16, 768, 2048, 128
    words = torch.zeros(n, k // 8, dtype=torch.int32, device=device)
    scale = torch.full((n, k // group), 0.01, dtype=torch.bfloat16, device=device)
    weights = [[IntWeight(words, scale, None, 4, k, group)] for _ in range(count)]
    stack = packed_stack("experts", (count, n, k), False, weights, torch.bfloat16, "")
    one, many = (torch.zeros(rows, k, dtype=torch.bfloat16, device=device) for rows in (1, 64))
    pairs = Routing(chosen=torch.arange(8, device=device).view(1, 8))
    rows = Routing(torch.arange(4, 4 * count + 1, 4, dtype=torch.int32, device=device))
    found = {"experts, 8 pairs of a token": microseconds(lambda: stack.routed_product(one, pairs))}
    return found | {"experts, 64 sorted rows": microseconds(lambda: stack.routed_product(many, rows))}


def main() -> None:
    """Parse, measure in processes of their own, in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the root of another checkout")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(layers(args.device)))
        return
    roots = {"here": ROOT} | ({"there": args.against} if args.against else {})
    told: dict[str, dict[str, list[float]]] = {name: {} for name in roots}
    for _ in range(args.rounds):
        for name, root in roots.items():
            paths = os.pathsep.join(str(root / part) for part in (".", "kernels", "eval"))
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(root / "scripts" / Path(__file__).name), "--worker", "--device", args.device]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                told[name].setdefault(key, []).append(value)
    print(f"{'µs a call, least of ' + str(args.rounds):36}" + "".join(f"{name:>10}" for name in roots))
    for key in told["here"]:
        # A checkout of before may not have all.
        cells = (f"{min(told[name][key]):.1f}" if key in told[name] else "-" for name in roots)
        print(f"{key:36}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    main()
