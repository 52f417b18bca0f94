"""The table of grids: plain data without torch, and what each row refuses."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest
import torch

from llmq import formats
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS, RANGES, find, inputs_of


def test_the_table_loads_no_torch() -> None:
    code = "import sys, llmq.grids.table, llmq.grids.scheme, llmq; sys.exit('torch' in sys.modules)"
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=path).returncode == 0


@pytest.mark.parametrize("grid", GRIDS.values(), ids=str)
def test_a_row_contradicts_itself_nowhere(grid: object) -> None:
    row = find(grid.name)  # type: ignore[attr-defined]
    assert row is grid
    assert row.label and ("{bits}" in row.label or len(row.bits) == 1), "schemes of other bits must read otherwise"
    assert {row.usual, row.calibrated} <= set(row.ranges) <= set(RANGES)
    assert row.bits == tuple(sorted(row.bits)) and all((1 if row.vector_code else 2) <= bits <= 8 for bits in row.bits)
    assert row.inputs is None or row.inputs.low < 0 < row.inputs.high <= row.inputs.divisor


def test_the_nearest_name_is_told() -> None:
    listed = ", ".join(GRIDS)
    with pytest.raises(LlmqError, match=f"grid 'nf5' is not known: choose from {listed}; did you mean 'nf4'"):
        find("nf5")


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("int", (9, 128, True), "grid 'int' is 2 to 8 bits"),
        ("fp8-block", (8, 64, True), "in blocks (group size) of 128"),
        ("fp8", (8, 128, True), "grid 'fp8' is 8 bits, symmetric, group size 'channel'"),
        ("fp8", (8, None, False), "grid 'fp8' is 8 bits, symmetric, group size 'channel'"),
        ("nf4", (4, 48, True), "in blocks (group size) of 32, 64"),
        ("nf4", (4, None, True), "in blocks (group size) of 32, 64"),
    ],
)
def test_refusals_say_what_there_is(name: str, sizes: tuple[int, int | None, bool], told: str) -> None:
    assert told in str(find(name).refusal(*sizes))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("int", (3, 48, False)), ("int", (8, None, True)), ("fp8", (8, None, True)), ("nf4", (4, 64, True))],
)
def test_what_there_is_is_not_refused(name: str, sizes: tuple[int, int | None, bool]) -> None:
    assert find(name).refusal(*sizes) is None


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(3, 32),
        Scheme(8, None),
        Scheme(8, None, grid="fp8"),
        Scheme(4, 64, grid="nf4", double_quant=True),
        Scheme(4, 16, grid="nvfp4"),
        Scheme(6, 32, grid="mxfp6"),
        Scheme(2, 64, grid="ternary"),
    ],
    ids=str,
)
def test_codes_take_the_bits_on_disk_that_the_table_says(scheme: Scheme) -> None:
    sizes = formats.of(scheme).spec((64, 256), scheme, torch.bfloat16)
    dtype, shape = next(iter(sizes.values()))
    assert 8 * prod(shape) * dtype.itemsize == scheme.stored_bits * 64 * 256


def test_inputs_are_rounded_by_one_table() -> None:
    """compressed-tensors' limits; a grid that leaves inputs alone says so."""
    assert (inputs_of("int").low, inputs_of("int").high, inputs_of("int").divisor) == (-128.0, 127.0, 127.5)
    assert inputs_of("fp8").divisor == 448.0
    for name in ("nf4", "int9"):
        with pytest.raises(LlmqError, match=f"on the grid int or fp8 or .*, not '{name}'"):
            inputs_of(name)
