"""Seconds of each stage of `llmq quantize`: `python scripts/stages.py TIMES.json quantize MODEL -o OUT …`.

Functions of llmq are wrapped from outside, so that the product has no timers. Time belongs to the innermost stage that
runs, all of a verification to that. TIMES.json has the seconds and the processor seconds (of all threads) by stage.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REST = "rest"
CLOSED = ("verify",)
"""Stages that count all that runs in them."""
STAGES = {
    "llmq.streaming.stream:BlockIO.open": "read",
    "llmq.streaming.stream:BlockIO.fill": "read",
    "llmq.streaming.stream:BlockIO.load": "read",
    "llmq.streaming.stream:BlockIO.untouched": "read",
    "llmq.streaming.stream:copy_rest": "read",
    "llmq.streaming.stream:record_calls": "forward",
    "llmq.discovery.calls:Call._ran": "forward",
    "llmq.block.block:Block.observe": "forward",
    "llmq.block.statistics:MeanSquare.update": "statistics",
    "llmq.block.statistics:Hessian.update": "statistics",
    "llmq.block.statistics:Inputs.update": "statistics",
    "llmq.block.moments:Moments.update": "statistics",
    "llmq.block.moments:compare": "statistics",
    "llmq.streaming.steps:correct": "correction",
    "llmq.streaming.steps:round_weight": "solve",
    "llmq.numerics.gptq:factorize": "factor",
    "llmq.numerics.gptq:improve": "sweeps",
    "llmq.streaming.stream:pack_weights": "pack",
    "llmq.checkpoint.sink:Sink.commit": "write",
    "llmq.checkpoint.sink:Sink.finish": "write",
    "llmq.streaming.stream:verify": "verify",
    "llmq.streaming.stream:verify_rest": "verify",
}
"""What is run → its stage: functions where they are looked up, and methods. Range search: see `wrap`."""
RANGES = ("find_scale", "fitted")


class Clock:
    """Seconds, and seconds of all of the process's threads, by stage."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.stack = [REST]
        self.last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def settle(self) -> None:
        """Add what has passed since the last call to the current stage."""
        now = self._now()
        entry = self.times.setdefault(self.stack[-1], [0.0, 0.0])
        for index in range(2):
            entry[index] += now[index] - self.last[index]
        self.last = now

    def timed(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """A function that counts as a stage."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            self.stack.append(self.stack[-1] if self.stack[-1] in CLOSED else stage)
            try:
                return call(*args, **kwargs)
            finally:
                self.settle()
                self.stack.pop()

        return run


def wrap(clock: Clock) -> None:
    """Wrap all functions of STAGES, and the range search of every grid."""
    for place, stage in STAGES.items():
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, clock.timed(getattr(owner, name), stage))
    grids = importlib.import_module("llmq.grids")
    for info in pkgutil.iter_modules(grids.__path__, "llmq.grids."):
        importlib.import_module(info.name)
    for kind in _derived(importlib.import_module("llmq.grids.base").Rounding):
        for name in RANGES:
            if name in vars(kind):
                setattr(kind, name, clock.timed(getattr(kind, name), "range search"))


def _derived(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _derived(one)


def main() -> None:
    """Run the command line with all stages timed."""
    out, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
    clock = Clock()
    wrap(clock)
    try:
        importlib.import_module("llmq.cli.app").main()
    finally:
        clock.settle()
        out.write_text(json.dumps(clock.times))


if __name__ == "__main__":
    main()
