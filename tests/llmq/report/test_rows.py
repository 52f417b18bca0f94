"""Rows of the report: to JSON and back, of today's llmq and of an earlier one; what they say of a weight."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.block.attempt import Outcome
from llmq.discovery.reasons import Kind, Reason
from llmq.grids.scheme import Activations, Scheme
from llmq.methods import Pipeline
from llmq.methods.rtn import RTN
from llmq.recipe.recipe import Recipe
from llmq.report.rows import BlockRow, KeptRow, WeightRow, read_attempt, read_block, read_tune, read_weight, weight_row
from llmq.streaming import steps
from tests.llmq.block.attempts import LOG
from tests.llmq.blocks import open_block
from tests.llmq.refusal import refused

STATIC = Scheme(8, None, activations=Activations(False, "kl"))
WEIGHTS = [
    WeightRow("a.b", (8, 64), 3, 300, Scheme(4, 32), 0.1, ("damped",), 1.5),
    WeightRow("a.c", (8, 64), 3, 300, STATIC, 0.1),
    WeightRow("a.9.b", (8, 64), 3, 300, Scheme(4, 32), 0.1, (), 1.5, 9, 32, 0.5),
    WeightRow("a.d", (8, 64), 3, 300, Scheme(4, 64, grid="nf4", double_quant=True), 0.1),
    KeptRow("a.e", (8, 64), None, 1024, Reason(Kind.OUTSIDE, "outside the decoder blocks")),
]


def through_json(row: Any) -> Any:
    return json.loads(json.dumps(asdict(row)))


@pytest.mark.parametrize("row", WEIGHTS, ids=lambda row: row.name)
def test_a_weight_is_read_back(row: WeightRow | KeptRow) -> None:
    assert read_weight(through_json(row)) == row


@pytest.mark.parametrize("row", [BlockRow("x.0", 0.1, 2.0, LOG, 5, 6, 7, True, 0.99), BlockRow("x.0", 0.1, 2.0)])
def test_a_block_is_read_back(row: BlockRow) -> None:
    read = read_block(through_json(row))
    assert read == row and all(isinstance(attempt.outcome, Outcome) for attempt in read.log)


def test_rows_of_an_earlier_llmq() -> None:
    """`kept` meant two things, `what` was searched for ': ', and FP8's grid was called float."""
    fp8 = {"activations": None, "bits": 8, "double_quant": False, "grid": "float", "group_size": None}
    usual = {"name": "a", "shape": [8, 64], "block": 0, "bytes": 9}
    quantized = usual | {"error": 0.1, "notes": ["n"], "seconds": 0.5, "scheme": fp8 | {"symmetric": True}}
    assert read_weight(quantized) == WeightRow("a", (8, 64), 0, 9, Scheme(8, None, grid="fp8"), 0.1, ("n",), 0.5)
    assert read_weight(quantized).expert is None is read_weight(quantized).tokens  # type: ignore[union-attr]
    kept = usual | {"scheme": None, "error": 0.0, "kept": "kept by --keep"}
    assert read_weight(kept) == KeptRow("a", (8, 64), 0, 9, Reason(Kind.UNTOLD, "kept by --keep"))
    lines = [
        {"what": "awq: norm → first, second", "before": 0.5, "after": 0.4, "kept": True, "choice": "α 0.5"},
        {"what": "awq: up → down", "before": 0.4, "after": None, "kept": False, "why": LOG[1].why},
        {"what": "AWQ", "before": 0.3, "after": 0.2, "kept": True},
    ]
    assert tuple(map(read_attempt, lines)) == LOG[:3]
    assert read_block({"name": "x", "error": 0.1, "seconds": 1.0, "log": lines}).log == LOG[:3]


def test_the_row_of_a_weight(tiny_model: Path) -> None:
    block = open_block(tiny_model, Recipe(methods=("awq",), scheme=Scheme(4, 16)))
    value = next(iter(block.weights.values())).value.double().clone()
    steps.quantize(block, Pipeline((), RTN(), ()))
    state = next(iter(block.weights.values()))
    assert state.quantized is not None
    row = weight_row(state, 2, 77)
    rounded = state.quantized.dequantize(torch.float32).double()
    assert row.error == pytest.approx(float((rounded - value).norm() / value.norm()), rel=1e-5)
    assert (row.name, row.shape) == (state.name, tuple(value.shape))
    assert (row.block, row.bytes, row.scheme, row.notes) == (2, 77, Scheme(4, 16), ())
    assert row.expert is None and weight_row(state, 2, 77, 5).expert == 5
    outside = weight_row(state, None, 77)
    assert outside.block is None and read_weight(through_json(outside)) == outside


def test_a_scheme_that_is_none_is_refused_by_the_weights_name_each_time() -> None:
    data = through_json(WEIGHTS[0])
    data["scheme"]["bits"] = 77
    for name in ("first", "second"):
        refused(lambda name=name: read_weight(data | {"name": name}), name, "77")


def test_training_is_told_with_what_came_of_it() -> None:
    data = {"before": 0.05, "after": 0.04, "at": 20, "steps": 60, "scales": 1234, "norms": 5, "windows": 128}
    data["seconds"] = 9.0
    row = read_tune({**data, "kept": True, "of": "digest"})
    assert row is not None and asdict(row) == data and row.kept
    for told in ("0.0500 → 0.0400", "step 20 of 60", "1,234 scales and 5 norms", "kept", "before it"):
        assert told in str(row)
    undone = replace(row, at=0, after=0.05)
    assert not undone.kept and "nothing was changed" in str(undone) and "0.0500" in str(undone)
    assert read_tune(None) is None
