"""Speed and memory of loading and running a model, each model measured in a separate process.

`measure` starts that process, `python -m llmq_eval.speed`, so that earlier models do not affect the result.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, first_line

REPEATS = 7
"""Repeats of prefill and decode, after a warm-up: enough for a 95 % interval of the median."""
PROMPT = 512
TOKENS = 64


@dataclass(frozen=True)
class Speed:
    """load_seconds: of `load_model`, until the model is ready to run. prefill, decode: tokens per second at batch 1.
    All three have one number per repeat. Memory in bytes: before: of the process before loading; resident: after
    loading; peak: the process's largest; device: the peak of tensor memory on the GPU, None on a CPU. prompt, tokens:
    lengths; threads: of torch.
    """

    load_seconds: list[float]
    prefill: list[float]
    decode: list[float]
    before: int
    resident: int
    peak: int
    device: int | None
    prompt: int
    tokens: int
    threads: int
    dtype: str


def measure(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    repeats: int = REPEATS,
    prompt: int = PROMPT,
    tokens: int = TOKENS,
    kernels: bool = False,
    trust_remote_code: bool = False,
) -> Speed:
    """Run the measurements in a new process. Raises LlmqError with its error.

    kernels: quantized weights stay packed and run on llmq's operators.
    """
    import torch

    arguments = [str(folder), dtype, device, str(repeats), str(prompt), str(tokens), str(torch.get_num_threads())]
    # -P: modules in the current directory must not shadow installed ones.
    command = [sys.executable, "-P", "-m", "llmq_eval.speed", *arguments]
    command += [*(["--trust"] if trust_remote_code else []), *(["--kernels"] if kernels else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["no word of it"])[-1]
        how = "was killed, out of memory?" if done.returncode < 0 else last
        raise LlmqError(f"{folder}: measuring its speed failed: {how}") from error
    if "error" in answer:
        raise LlmqError(answer["error"])
    return Speed(**answer)


def run(
    folder: Path,
    dtype: str,
    device: str,
    repeats: int,
    prompt: int,
    tokens: int,
    *,
    kernels: bool = False,
    trust_remote_code: bool = False,
) -> Speed:
    """The measurements themselves, in this process. Raises LlmqError as `load_model` does."""
    import psutil
    import torch

    from llmq.inference.pretrained import input_device, load_model
    from llmq.machine import peak_memory
    from llmq_eval.perplexity import shown_dtype
    from llmq_eval.windows import default_window

    prompt = min(prompt, default_window(folder, trust_remote_code) - tokens - 1)
    if prompt < 1:
        raise LlmqError(f"{folder} cannot generate {tokens} new tokens: its longest input is shorter")
    process = psutil.Process()
    before = process.memory_info().rss

    def load() -> tuple[Any, float]:
        begin = time.perf_counter()
        made = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, kernels=kernels)
        _wait(input_device(device))
        return made, time.perf_counter() - begin

    model, _ = load()
    place = input_device(device)
    resident = process.memory_info().rss
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (1, prompt), generator=torch.Generator().manual_seed(0)).to(place)
    timed = [_once(model, ids, tokens, place) for _ in range(repeats + 1)][1:]
    on_device = torch.cuda.max_memory_allocated(place) if place.startswith("cuda") else None
    peak, kind = peak_memory(), shown_dtype(model, kernels)
    # The first load also imports modules, so it is not counted; these later loads are timed, but their memory is not
    # measured.
    loads = []
    for _ in range(repeats):
        del model
        gc.collect()
        model, seconds = load()
        loads.append(seconds)
    return Speed(
        load_seconds=loads,
        prefill=[prompt / first for first, _ in timed],
        decode=[(tokens - 1) / rest for _, rest in timed],
        before=before,
        resident=resident,
        peak=peak,
        device=on_device,
        prompt=prompt,
        tokens=tokens,
        threads=torch.get_num_threads(),
        dtype=kind,
    )


class _Clock:
    """A streamer of `generate` that records the time of the prompt and of each new token."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        _wait(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


def _once(model: Any, ids: Any, tokens: int, device: str) -> tuple[float, float]:
    """Seconds to the first token, and from the first to the last."""
    import torch
    from transformers import GenerationConfig

    clock = _Clock(device)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    with torch.inference_mode():
        model.generate(ids, generation_config=config, streamer=clock)
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return first - start, last - first


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def main() -> None:
    """Entry point of the process: prints one line of JSON, the measurements or an error that the user can fix."""
    parser = argparse.ArgumentParser()
    for name in ("folder", "dtype", "device"):
        parser.add_argument(name)
    for name in ("repeats", "prompt", "tokens", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    try:
        found = run(
            Path(given.folder),
            given.dtype,
            given.device,
            given.repeats,
            given.prompt,
            given.tokens,
            kernels=given.kernels,
            trust_remote_code=given.trust,
        )
        print(json.dumps(asdict(found)))
    except LlmqError as error:
        print(json.dumps({"error": str(error)}))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        print(json.dumps({"error": f"{given.folder}: it does not generate text: {first_line(error)}"}))


if __name__ == "__main__":
    main()
