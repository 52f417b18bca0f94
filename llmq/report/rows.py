"""The rows of report.json: the result of every weight and every block. A run's journal holds the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import WeightState, relative_error
from llmq.discovery.reasons import Kind, Reason
from llmq.errors import LlmqError
from llmq.grids.cache import Cache
from llmq.grids.scheme import Scheme, changed_scheme


@dataclass(frozen=True)
class WeightRow:
    """A quantized weight.

    shape: [out, in]; block: its number, None outside the blocks, where nothing is calibrated; bytes: stored; error:
    relative, in the Frobenius norm, of the quantized weight to the weight after all transforms; notes: fallbacks
    used; seconds: of its quantization; correction: if it was corrected for the errors of weights before it, how
    strongly, from 0 to 1: for those of its input, and for those of the residual stream that its output is added to
    (None: no stream was found). Of a routed expert's weight also expert: its number in the block; tokens: those of the
    calibration windows (if no method needs data, of the one window that checks blocks) that chose it; alpha: the share
    of their own statistics in those that it was quantized with, from 0 to 1, None if the methods use no such
    statistics. None for other weights.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    bytes: int
    scheme: Scheme
    error: float
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    expert: int | None = None
    tokens: int | None = None
    alpha: float | None = None
    correction: tuple[float, float | None] | None = None


@dataclass(frozen=True)
class KeptRow:
    """A weight with two or more axes that is not quantized, with the reason. block: None outside the blocks."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    bytes: int
    reason: Reason


@dataclass(frozen=True)
class BlockRow:
    """A decoder block.

    error: relative, of its output on the calibration windows; zero: that output is all zeros before quantization, so
    that nothing can be relative to it, and the error is absolute; seconds: in all; log: the methods' attempts; memory,
    peak: the resident size of the process that quantized it, at the block's end, and the largest until then; device:
    the peak of tensor memory on the GPU while the block was quantized; routing: of the choices of experts that the
    unquantized block makes on the inputs of its target, the share, from 0 to 1, that the block also makes on its own
    inputs with all its weights but the experts' quantized. None if not recorded.
    """

    name: str
    error: float
    seconds: float
    log: tuple[Attempt, ...] = ()
    memory: int | None = None
    peak: int | None = None
    device: int | None = None
    zero: bool = False
    routing: float | None = None

    @property
    def shown(self) -> str:
        """The error in words: a number, or that there is none."""
        return "output is zero" if self.zero else f"{self.error:.2e}"


@dataclass(frozen=True)
class TuneRow:
    """The training of the whole model after its blocks.

    before, after: the mean KL in nats of the logits to the unquantized model's, on windows that were held out, at the
    start and at the best step; at: that step, 0 if none was better, and nothing was changed then; steps: that were
    made; scales, norms: how many scales and how many norms were trained; windows: calibration windows; seconds: in all.
    """

    before: float
    after: float
    at: int
    steps: int
    scales: int
    norms: int
    windows: int
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether the trained values were written."""
        return self.at > 0

    def __str__(self) -> str:
        if not self.kept:
            return (
                f"KL to the unquantized model on held-out windows {self.before:.4f}, and no less in {self.steps} "
                "steps: nothing was changed"
            )
        return (
            f"{self.scales:,} scales and {self.norms} norms trained; KL to the unquantized model on held-out windows "
            f"{self.before:.4f} → {self.after:.4f} at step {self.at} of {self.steps}: kept (errors of weights and "
            "blocks are those before it)"
        )


@dataclass(frozen=True)
class CacheRow:
    """How keys and values are rounded. kind: as in `grids.cache.CACHES`; scales: a module's name in the checkpoint →
    the stored scales of its keys and of its values, one each, or one for each head; without: the blocks that keep none.
    """

    kind: str
    scales: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"keys and values of {len(self.scales)} layers in {Cache.named(self.kind).told}"]
        for which, what in enumerate(("keys", "values")):
            every = [scale for pair in self.scales.values() for scale in pair[which]]
            told.append(f"{what} {min(every):.3g} to {max(every):.3g}")
        blocks = f"; {len(self.without)} blocks keep none" if self.without else ""
        return f"{told[0]} (scales of {', of '.join(told[1:])}){blocks}"


def read_cache(data: Mapping[str, Any] | None) -> CacheRow | None:
    """A row from plain data; None if there is none. Raises KeyError or TypeError."""
    if data is None:
        return None
    scales = {name: (tuple(keys), tuple(values)) for name, (keys, values) in data["scales"].items()}
    return CacheRow(data["kind"], scales, tuple(data["without"]))


def read_tune(data: Mapping[str, Any] | None) -> TuneRow | None:
    """A row from plain data; None if there is none. Raises KeyError or TypeError."""
    return None if data is None else TuneRow(**{name: data[name] for name in TuneRow.__dataclass_fields__})


def weight_row(state: WeightState, block: int | None, nbytes: int, expert: int | None = None) -> WeightRow:
    """The row of a quantized weight. nbytes: its size on disk; expert: its number, if it is a routed expert's."""
    assert state.quantized is not None
    return WeightRow(
        state.name,
        tuple(state.value.shape),
        block,
        nbytes,
        state.scheme,
        relative_error([state.result()], [state.value]) if state.error is None else state.error,
        tuple(state.quantized.notes),
        round(state.seconds, 3),
        expert,
        correction=state.correction,
    )


def told_corrections(rows: Sequence[WeightRow]) -> str | None:
    """In a sentence, which weights in the blocks were corrected for the errors of earlier ones; None if none was."""
    rows = [row for row in rows if row.block is not None]
    found = [row.correction for row in rows if row.correction is not None]
    if not found:
        return None
    streams = [stream for _, stream in found if stream is not None]
    told = (
        f"{len(found)} of {len(rows)} weights were corrected for the errors of earlier ones in their inputs (median "
        f"strength {median(by for by, _ in found):.2f})"
    )
    if streams:
        told += f", {len(streams)} also for those in the residual stream (median {median(streams):.2f})"
    else:
        told += ", none for those in the residual stream: no output is added to one unchanged"
    experts = sum(row.expert is not None for row in rows)
    return told + (f"; {experts} weights of routed experts were not" if experts else "")


def read_weight(data: Mapping[str, Any]) -> WeightRow | KeptRow:
    """A row from plain data, also of earlier versions. Raises KeyError, TypeError, ValueError or LlmqError."""
    shared = {"name": str(data["name"]), "shape": tuple(data["shape"]), "block": data["block"], "bytes": data["bytes"]}
    if data.get("scheme") is not None:
        scheme = _scheme(json.dumps(data["scheme"]), shared["name"])
        return WeightRow(
            **shared,
            scheme=scheme,
            error=data["error"],
            notes=tuple(data.get("notes", ())),
            seconds=data.get("seconds", 0.0),
            expert=data.get("expert"),
            tokens=data.get("tokens"),
            alpha=data.get("alpha"),
            correction=None if data.get("correction") is None else tuple(data["correction"]),
        )
    reason = data.get("reason")
    if reason is None:  # earlier reports have the sentence only
        return KeptRow(**shared, reason=Reason(Kind.UNTOLD, data["kept"]))
    return KeptRow(**shared, reason=Reason(Kind(reason["kind"]), reason["sentence"]))


def read_block(data: Mapping[str, Any]) -> BlockRow:
    """A row from plain data, also of earlier versions. Raises KeyError, TypeError, ValueError or LlmqError."""
    more = {key: data[key] for key in ("memory", "peak", "device", "zero", "routing") if key in data}
    log = tuple(read_attempt(line) for line in data.get("log", ()))
    return BlockRow(data["name"], data["error"], data["seconds"], log, **more)


def read_attempt(data: Mapping[str, Any]) -> Attempt:
    """An attempt from plain data; earlier versions stored method and pair in one text, and whether it was kept."""
    if "method" in data:
        return Attempt(**{**data, "outcome": Outcome(data["outcome"])})
    method, _, where = data["what"].partition(": ")
    outcome = Outcome.KEPT if data["kept"] else Outcome.UNDONE
    choice, why = (str(data.get(key) or "") for key in ("choice", "why"))
    return Attempt(method, where or None, data["before"], data["after"], outcome, choice, why)


def _scheme(text: str, name: str) -> Scheme:
    """The scheme of a weight, from JSON. Raises KeyError, TypeError or LlmqError."""
    found = _known_scheme(text)
    return found if isinstance(found, Scheme) else changed_scheme(found, Scheme(), name)


@lru_cache(maxsize=256)
def _known_scheme(text: str) -> Scheme | dict[str, Any]:
    """A scheme from JSON, which is the same for very many weights; its data if it is none.

    Earlier versions called the grid fp8 'float'.
    """
    scheme = json.loads(text)
    current = {**scheme, "grid": {"float": "fp8"}.get(scheme["grid"], scheme["grid"])}
    try:
        return changed_scheme(current, Scheme(), "")
    except LlmqError:
        return current
