"""Convert each kind of measurement to `Measure`: plain numbers with their 95 % intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmq_eval import intervals
from llmq_eval.results import Measure, measure_from, plain

if TYPE_CHECKING:
    from llmq_eval.divergence import Divergence
    from llmq_eval.perplexity import Perplexity
    from llmq_eval.speed import Speed


def to_json(measures: Sequence[Measure]) -> str:
    """A list of measures as the text of a file."""
    return json.dumps([plain(asdict(measure)) for measure in measures], allow_nan=False) + "\n"


def read(file: Path) -> list[Measure] | None:
    """The measures in a file of `to_json`; None if it is missing or cannot be read."""
    try:
        return [measure_from(data) for data in json.loads(file.read_text(encoding="utf-8"))] or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def perplexity(text: str, found: Perplexity) -> Measure:
    """Perplexity; its interval is that of the mean over windows, exponentiated."""
    _, low, high = intervals.mean(found.by_window)
    low, high = (None if bound is None else math.exp(min(bound, 700.0)) for bound in (low, high))
    return Measure(
        f"perplexity:{text}", "perplexity", found.value, low, high, "", False, found.protocol, found.by_window
    )


def divergence(text: str, found: Divergence, base: str | None = None) -> list[Measure]:
    """Means, with intervals over windows, and quantiles over positions, with intervals by resampling windows.

    base: the base model, as in `Measure.base`.
    """
    task = f"divergence:{text}"
    made = []
    of: list[tuple[str, list[float], str, bool | None]] = [
        ("kl", found.kl, "nats", False),
        ("top1", found.top1, "share", True),
        ("lost", found.lost, "share", False),
        ("gained", found.gained, "share", None),
    ]
    for metric, samples, unit, better in of:
        value, low, high = intervals.mean(samples)
        low, high = (None, None) if low is None or high is None else (max(0.0, low), high)
        if high is not None and unit == "share":
            high = min(1.0, high)
        made.append(Measure(task, metric, value, low, high, unit, better, found.protocol, samples, base))
    for name, value, bounds in zip(
        ("kl_p50", "kl_p90", "kl_p99", "kl_max"), found.quantiles, found.bounds, strict=True
    ):
        made.append(Measure(task, name, value, *bounds, "nats", False, found.protocol, None, base))
    return made


def speed(kind: str, found: Speed, place: str) -> list[Measure]:
    """'speed': medians of the repeats; 'memory': bytes, one reading each. place: CPU or GPU, for the protocol."""
    where = f"{found.dtype}, {place}, {found.threads} threads, in a process of its own"
    if kind == "memory":
        protocol = (
            f"{where}: before the model, after loading it, and at most with {found.prompt} tokens of prompt and "
            + (f"{found.tokens} new ones")
        )
        sizes = {
            "before_bytes": found.before,
            "resident_bytes": found.resident,
            "peak_bytes": found.peak,
            "device_bytes": found.device,
        }
        return [
            Measure("memory", name, float(value), None, None, "bytes", False, protocol)
            for name, value in sizes.items()
            if value is not None
        ]
    protocol = (
        f"{where}, batch 1, median of {len(found.prefill)} repeats, prefill of {found.prompt} tokens, then "
        f"{found.tokens - 1} tokens one by one by generate()"
    )
    loaded = f"{where}, median of {len(found.load_seconds)} loads after a first one"
    made = []
    for name, samples, unit, better, said in (
        ("load_seconds", found.load_seconds, "s", False, loaded),
        ("prefill_tokens_per_second", found.prefill, "tokens/s", True, protocol),
        ("decode_tokens_per_second", found.decode, "tokens/s", True, protocol),
    ):
        value, low, high = intervals.median(samples)
        made.append(Measure("speed", name, value, low, high, unit, better, said, samples))
    return made
