"""The rows of report.json: what became of every weight, and of every block. The journal of a run holds the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import WeightState, relative_error
from llmq.discovery.reasons import Kind, Reason
from llmq.grids.scheme import Scheme, changed_scheme


@dataclass(frozen=True)
class WeightRow:
    """A quantized weight.

    shape: [out, in]; block: its number; bytes: stored; error: relative, of the rounded weight to what was to be rounded
    (after all transforms), in the Frobenius norm; notes: what did not go the usual way; seconds: of its rounding.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    bytes: int
    scheme: Scheme
    error: float
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class KeptRow:
    """A weight with two or more axes that was left alone, for a reason. block: None outside the blocks."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    bytes: int
    reason: Reason


@dataclass(frozen=True)
class BlockRow:
    """A decoder block.

    error: relative, of its output on the calibration windows; seconds: in all; log: what methods tried; memory, peak:
    the resident size of the process that quantized it, at its end, and the largest until then; device: on a GPU, the
    most that tensors took there while the block was quantized. None where it was not recorded.
    """

    name: str
    error: float
    seconds: float
    log: tuple[Attempt, ...] = ()
    memory: int | None = None
    peak: int | None = None
    device: int | None = None


def weight_row(state: WeightState, block: int, nbytes: int) -> WeightRow:
    """The row of a weight that has its result. nbytes: what it takes on disk."""
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
    )


def read_weight(data: Mapping[str, Any]) -> WeightRow | KeptRow:
    """A row from plain data, of an earlier llmq too. Raises KeyError, TypeError, ValueError or LlmqError."""
    shared = {"name": str(data["name"]), "shape": tuple(data["shape"]), "block": data["block"], "bytes": data["bytes"]}
    if data.get("scheme") is not None:
        scheme = changed_scheme(_current(data["scheme"]), Scheme(), data["name"])
        return WeightRow(
            **shared,
            scheme=scheme,
            error=data["error"],
            notes=tuple(data.get("notes", ())),
            seconds=data.get("seconds", 0.0),
        )
    reason = data.get("reason")
    if reason is None:  # earlier reports have the sentence only
        return KeptRow(**shared, reason=Reason(Kind.UNTOLD, data["kept"]))
    return KeptRow(**shared, reason=Reason(Kind(reason["kind"]), reason["sentence"]))


def read_block(data: Mapping[str, Any]) -> BlockRow:
    """A row from plain data, of an earlier llmq too. Raises KeyError, TypeError, ValueError or LlmqError."""
    more = {key: data[key] for key in ("memory", "peak", "device") if key in data}
    log = tuple(read_attempt(line) for line in data.get("log", ()))
    return BlockRow(data["name"], data["error"], data["seconds"], log, **more)


def read_attempt(data: Mapping[str, Any]) -> Attempt:
    """An attempt from plain data; that of an earlier llmq says method and pair in one text, and kept or not."""
    if "method" in data:
        return Attempt(**{**data, "outcome": Outcome(data["outcome"])})
    method, _, where = data["what"].partition(": ")
    outcome = Outcome.KEPT if data["kept"] else Outcome.UNDONE
    words = {key: data.get(key) or "" for key in ("choice", "why")}
    return Attempt(method, where or None, data["before"], data["after"], outcome, **words)


def _current(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """A scheme as it is written today: the grid of 8-bit floats was once called float."""
    return {**scheme, "grid": {"float": "fp8"}.get(scheme["grid"], scheme["grid"])}
