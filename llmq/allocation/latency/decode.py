"""The time of a model's decode steps, one token after another, and how much of it some of its modules take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmq.allocation.prefill import Fused, tensors_in
from llmq.discovery.dry import without_arithmetic
from llmq.discovery.parameters import shared_zeros
from llmq.errors import LlmqError, first_line

STEPS = 40
"""The most decode steps that are timed."""
LEAST = 5
"""Steps that are timed however long they take."""
WARM = 2
SECONDS = 5.0
"""After so many seconds no step begins."""
CHUNK = 512
"""Tokens that are read at a time: masks of a whole prompt take the square of its length."""
SHORT = 8
"""Tokens in the cache of a model that does not run without arithmetic."""
FILL = 0.01


@dataclass
class Start:
    """What a model keeps of `tokens` tokens in each of `batch` rows, by its name among the model's arguments.

    Of zeros that have no memory; `cache` gives it some.
    """

    kept: dict[str, Any]
    tokens: int
    batch: int

    @property
    def nbytes(self) -> int:
        """Of all tensors of `cache`."""
        return sum(tensor.nbytes for tensor in tensors_in(list(self.kept.values())))

    def cache(self, device: torch.device) -> dict[str, Any]:
        """Values in memory of their own, on a device. Each call gives new ones."""
        return {name: _materialized(value, device, {}) for name, value in self.kept.items()}


@dataclass
class Times:
    """Milliseconds. step: of a decode step; parts: of modules within it, by their paths."""

    step: float
    parts: dict[str, float] = field(default_factory=dict)


def start(model: nn.Module, context: int, batch: int) -> Start:
    """What a model keeps of `batch` rows of `context` tokens, or of fewer, if it runs without arithmetic on no more.

    model: its parameters may be on the meta device. Raises LlmqError if it keeps nothing between tokens, or fails.
    """

    def begun(tokens: int) -> Start:
        kept: dict[str, Any] = {}
        for piece in torch.zeros(batch, tokens, dtype=torch.long).split(CHUNK, 1):  # type: ignore[no-untyped-call]
            kept = _cache_of(model(input_ids=piece, use_cache=True, **kept))
        return Start(kept, tokens, batch)

    try:
        with torch.no_grad(), shared_zeros(model):
            try:
                with Fused(), without_arithmetic():
                    return begun(context)
            except LlmqError:
                raise
            except Exception as error:  # the model computes with values: it has to be run
                found = begun(min(context, SHORT))
                if isinstance(error, IndexError):
                    raise _too_long(error) from error
                return found
    except LlmqError:
        raise
    except Exception as error:  # model code may fail in any way
        raise _refused(model, error) from error


def timed(model: nn.Module, parts: Sequence[str], begin: Start, device: torch.device) -> Times:
    """The medians over decode steps that follow on `begin`. parts: modules, none within another.

    model: on the device; the forward methods of the parts are wrapped. Raises LlmqError if it fails.
    """
    clock = _Clock(device)
    for name in parts:
        clock.watch(name, model.get_submodule(name))
    try:
        with torch.inference_mode():
            steps = _steps(model, begin, clock, device)
            between = _between(model, begin.batch, device)
    except Exception as error:  # model code may fail in any way
        raise (_too_long(error) if isinstance(error, IndexError) else _refused(model, error)) from error
    found = {name: statistics.median(step.get(name, 0.0) for _, step in steps) for name in parts}
    return Times(statistics.median(whole for whole, _ in steps) + between, found)


def _steps(model: nn.Module, begin: Start, clock: _Clock, device: torch.device) -> list[tuple[float, dict[str, float]]]:
    cache: Mapping[str, Any] = begin.cache(device)
    token = torch.zeros(begin.batch, 1, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(0)
    steps = []
    began = time.perf_counter()
    for step in range(WARM + STEPS):
        clock.begin()
        output = model(input_ids=token, use_cache=True, **cache)
        output.logits[:, -1:].argmax(-1)
        if step >= WARM:
            steps.append(clock.end())
        # Rows of a batch differ, or all of them would choose the same experts.
        token = torch.randint(output.logits.shape[-1], token.shape, generator=generator).to(device)
        cache = _cache_of(output)
        if len(steps) >= LEAST and time.perf_counter() - began > SECONDS:
            break
    return steps


def _between(model: Any, batch: int, device: torch.device) -> float:
    """Milliseconds that `generate` takes beside the model, for each token; 0 for a model that has none."""
    if not hasattr(model, "generate"):
        return 0.0
    inside = model.forward
    calls: list[tuple[float, float]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = inside(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls.append((began, time.perf_counter()))
        return output

    # Without a token that pads, nothing is guessed and no warning printed.
    ids = torch.ones(batch, SHORT, dtype=torch.long, device=device)
    count = LEAST + WARM
    model.forward = forward
    try:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    except Exception:  # what generate needs beside the model may be missing: then nobody calls it
        return 0.0
    finally:
        del model.forward
    gaps = [1000 * (after[0] - before[1]) for before, after in zip(calls, calls[1:], strict=False)]
    return statistics.median(gaps[WARM - 1 :]) if len(gaps) >= WARM else 0.0


class _Clock:
    """Times on a CPU, or of a GPU's stream, where waiting for a launch counts as part of what is launched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []
        self.first: Any = None

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def watch(self, name: str, module: Any) -> None:
        """Time the module's forward."""
        inside = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            output = inside(*args, **kwargs)
            self.marks.append((name, began, self.now()))
            return output

        module.forward = forward

    def begin(self) -> None:
        """A step begins."""
        self.marks.clear()
        self.first = self.now()

    def end(self) -> tuple[float, dict[str, float]]:
        """Milliseconds of the step, and of each module in it."""
        last = self.now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for name, began, ended in self.marks:
            found[name] = found.get(name, 0.0) + self._apart(began, ended)
        return self._apart(self.first, last), found

    def _apart(self, began: Any, ended: Any) -> float:
        apart: float = began.elapsed_time(ended) if self.device.type == "cuda" else 1000 * (ended - began)
        return apart


def _cache_of(output: Any) -> dict[str, Any]:
    """What a model's output has for the next step, by its name among the arguments. Raises LlmqError for nothing."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    found = {name: getattr(output, name) for name in ALL_CACHE_NAMES if getattr(output, name, None) is not None}
    if not found:
        raise LlmqError("--target-latency: the model keeps no cache between tokens: give another budget")
    return found


def _materialized(value: Any, device: torch.device, seen: dict[int, Any]) -> Any:
    """A copy of a cache with memory of its own for each tensor, on a device: numbers are small, all else is alike."""
    if id(value) in seen:
        return seen[id(value)]
    made: Any = value
    if isinstance(value, Tensor):
        made = value.to(device, copy=True)
        if value.is_floating_point():
            made = torch.full(value.shape, FILL, dtype=value.dtype, device=device)
    elif isinstance(value, torch.device):
        made = device
    elif isinstance(value, (list, tuple, dict)):
        made = tree_map(lambda one: _materialized(one, device, seen), value, is_leaf=lambda one: one is not value)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not hasattr(value, "to_dict"):
        made = object.__new__(type(value))
        seen[id(value)] = made
        made.__dict__.update({name: _materialized(one, device, seen) for name, one in vars(value).items()})
    seen[id(value)] = made
    return made


def _too_long(error: Exception) -> LlmqError:
    return LlmqError(
        f"--target-latency: the model does not read so many tokens and generate more ({first_line(error)}): give a "
        "shorter --context"
    )


def _refused(model: nn.Module, error: Exception) -> LlmqError:
    return LlmqError(
        f"--target-latency: {type(model).__name__} does not decode one token after another here ({first_line(error)}), "
        "so its time cannot be found: give another budget"
    )
