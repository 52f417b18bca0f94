"""The Triton kernels for integer weights, in Triton's interpreter or on a GPU, against float64 and against the twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmq_kernels import layouts, planes, reference
from llmq_kernels.triton import tables
from llmq_kernels.triton.config import Config
from llmq_kernels.triton.gpu import KNOWN
from llmq_kernels.triton.rule import rule
from llmq_kernels.weights import PackedInt
from tests.kernels.weights import Plain, plain, tolerance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
ROWS = (1, 2, 3, 7, 16, 17, 33, 130)
# Small programs of every family: what the rule would choose for a GPU is too large to interpret.
ONE_ROW = Config("one_row", block_n=32, block_m=4, tiles=2, warps=1)
FEW_ROWS = Config("few_rows", block_n=32, block_m=16, programs_k=2, warps=2, stages=2)
MANY_ROWS = Config("many_rows", block_n=32, block_m=128, programs_k=1, warps=4, stages=2)
PRESCALED = Config("many_rows", block_n=16, block_m=16, programs_k=2, warps=4, stages=2, prescale=True)


def family(rows: int) -> Config:
    """A small program of the family that serves so many rows."""
    return ONE_ROW if rows <= 3 else FEW_ROWS if rows <= 17 else MANY_ROWS


def packed(weight: Plain, dtype: torch.dtype) -> PackedInt:
    zero = None if weight.zero is None else weight.zero.to(DEVICE)
    words, scale = weight.words.to(DEVICE), weight.scale.to(DEVICE)
    form = layouts.pack("planes", words, scale, zero, weight.bits, weight.shape[1], weight.group_size, dtype)
    return PackedInt(*form, weight.bits, *weight.shape, weight.group_size)


def check(weight: Plain, form: PackedInt, x: Tensor, bias: Tensor | None) -> None:
    """The product is float64's and the twin's, as far as rounding of weights and results allows."""
    moved = None if bias is None else bias.to(DEVICE)
    y = planes.linear(x.to(DEVICE), form, moved).cpu()
    twin = reference.int_linear(x, weight.words, weight.scale, weight.zero, bias, weight.bits, weight.group_size)
    exact = x.double() @ weight.dense.t()
    allowed = tolerance(x, weight.dense)
    if bias is not None:
        exact += bias.double()
        allowed += torch.finfo(x.dtype).eps * exact.abs()
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= allowed).all()
    assert ((y.double() - twin.double()).abs() <= 2 * allowed).all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 200])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_weight_by_every_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """200 inputs are no multiple of 32, of a tile or of a group (200: one scale for a row); 19 rows, of no program."""
    generator = torch.Generator().manual_seed(bits)
    weight = plain(19, 200, bits, group_size, symmetric=symmetric, dtype=dtype)
    form = packed(weight, dtype)
    for rows in ROWS:
        monkeypatch.setattr(tables, "choose", lambda *_, rows=rows: family(rows))
        x = torch.randn(rows, 200, generator=generator).to(dtype)
        check(weight, form, x, torch.randn(19, generator=generator).to(dtype) if rows % 2 else None)
    monkeypatch.setattr(tables, "choose", lambda *_: PRESCALED)
    check(weight, form, torch.randn(5, 200, generator=generator).to(dtype), None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("config", [ONE_ROW, FEW_ROWS, MANY_ROWS], ids=lambda config: config.family)
def test_whole_tiles_and_several_steps(monkeypatch: pytest.MonkeyPatch, bits: int, config: Config) -> None:
    """Inputs that fill every tile need no masks, which is another kernel."""
    width = planes.TILE[bits] * 4
    weight = plain(32, width, bits, 128, symmetric=False)
    monkeypatch.setattr(tables, "choose", lambda *_: config)
    check(weight, packed(weight, torch.bfloat16), torch.randn(3, width).to(torch.bfloat16), None)


@pytest.mark.parametrize("group_size", [96, 160, 256, 512])
@pytest.mark.parametrize("bits", [3, 4])
def test_groups_that_are_not_whole_tiles(monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int) -> None:
    weight = plain(9, 600, bits, group_size, symmetric=False)
    form = packed(weight, torch.bfloat16)
    for config in (ONE_ROW, FEW_ROWS, MANY_ROWS):
        monkeypatch.setattr(tables, "choose", lambda *_, config=config: config)
        check(weight, form, torch.randn(2, 600).to(torch.bfloat16), torch.randn(9))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_dequantizing_is_exact(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for group_size, scale_dtype in ((32, torch.float32), (64, torch.bfloat16), (300, torch.float16)):
        weight = plain(21, 300, bits, group_size, symmetric=symmetric, dtype=scale_dtype)
        form = packed(weight, torch.bfloat16)
        dense = planes.dequantize(form, dtype)
        assert torch.equal(dense.cpu(), weight.dense.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_many_rows_go_through_slabs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(tables, "choose", lambda *_: Config("dense"))
    monkeypatch.setattr(planes, "WORKSPACE", 3000)
    weight = plain(21, 300, 4, 128, symmetric=False)
    x = torch.randn(40, 300).to(dtype)
    form = packed(weight, torch.bfloat16)
    check(weight, form, x, torch.randn(21))
    monkeypatch.setattr(planes, "WORKSPACE", 1 << 20)
    check(weight, form, x, None)


def test_the_rule_itself() -> None:
    """Nothing replaced: what the rule says for the interpreter's four processors."""
    weight = plain(40, 260, 4, 128)
    form = packed(weight, torch.bfloat16)
    for rows in (1, 8, 40, 300):
        check(weight, form, torch.randn(rows, 260).to(torch.bfloat16), None)


def test_what_is_not_served() -> None:
    def reason(dtype: torch.dtype, bits: int, width: int, group_size: int) -> str:
        return planes.refusal(DEVICE, dtype, bits, 8, width, group_size) or ""

    assert reason(torch.bfloat16, 4, 256, 32) == reason(torch.float16, 3, 100, 100) == ""
    assert "float32" in reason(torch.float32, 4, 256, 32)
    assert "5" in reason(torch.bfloat16, 5, 256, 32)
    assert "48" in reason(torch.bfloat16, 4, 256, 48)


def test_tables_come_before_the_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = KNOWN[2]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.table.cache_clear()
    assert tables.choose(gpu, 4, 3, 64, 256, 128) == rule(gpu, 4, 3, 64, 256, 128)
    file = tables.user_table(gpu.name)
    file.parent.mkdir(parents=True)
    measured = {tables.key(4, 4, 64, 256, 128): tables.entry(ONE_ROW, 12.5)}
    file.write_text(json.dumps({"measured": measured}))
    tables.table.cache_clear()
    assert tables.choose(gpu, 4, 3, 64, 256, 128) == ONE_ROW
    assert tables.choose(gpu, 4, 5, 64, 256, 128) != ONE_ROW
    file.write_text("{")
    tables.table.cache_clear()
    with pytest.raises(ValueError, match="llmq tune"):
        tables.choose(gpu, 4, 3, 64, 256, 128)
    tables.table.cache_clear()
