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


def weight_row(state: WeightState, block: int | None, nbytes: int, expert: int | None = None) -> WeightRow:
    """The row of a quantized weight. nbytes: its size on disk; expert: its number, if it is a routed expert's."""
    assert state.quantized is not None
    return WeightRow(
        state.name,
        tuple(state.value.shape),
        block,
        nbytes,
        state.scheme,
        relative_error([state.result()], [state.value]),
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
