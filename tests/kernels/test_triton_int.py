"""The Triton kernels for integer weights, in Triton's interpreter or on a GPU, against float64 and against the twin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmq_kernels.int_linear import layouts, planes, reference
from llmq_kernels.triton import launch as launching
from llmq_kernels.triton import tables
from llmq_kernels.triton.config import Config
from llmq_kernels.triton.gpu import KNOWN
from llmq_kernels.triton.launch import Launch
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


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    planes.forget()
    yield
    planes.forget()


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(tables, "choose", lambda *_: config)
    planes.forget()


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
        use(monkeypatch, family(rows))
        x = torch.randn(rows, 200, generator=generator).to(dtype)
        check(weight, form, x, torch.randn(19, generator=generator).to(dtype) if rows % 2 else None)
    use(monkeypatch, PRESCALED)
    check(weight, form, torch.randn(5, 200, generator=generator).to(dtype), None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("config", [ONE_ROW, FEW_ROWS, MANY_ROWS], ids=lambda config: config.family)
def test_whole_tiles_and_several_steps(monkeypatch: pytest.MonkeyPatch, bits: int, config: Config) -> None:
    """Inputs that fill every tile need no masks, which is another kernel."""
    width = planes.TILE[bits] * 4
    weight = plain(32, width, bits, 128, symmetric=False)
    use(monkeypatch, config)
    check(weight, packed(weight, torch.bfloat16), torch.randn(3, width).to(torch.bfloat16), None)


@pytest.mark.parametrize("group_size", [96, 160, 256, 512])
@pytest.mark.parametrize("bits", [3, 4])
def test_groups_that_are_not_whole_tiles(monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int) -> None:
    weight = plain(9, 600, bits, group_size, symmetric=False)
    form = packed(weight, torch.bfloat16)
    for config in (ONE_ROW, FEW_ROWS, MANY_ROWS):
        use(monkeypatch, config)
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
    use(monkeypatch, Config("dense"))
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

    def choose(m: int, zeros: bool = False, dtype: torch.dtype = torch.bfloat16) -> Config:
        return tables.choose(gpu, 4, m, 64, 256, 128, zeros, dtype)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.table.cache_clear()
    assert choose(3) == rule(gpu, 4, 3, 64, 256, 128)
    file = tables.user_table(gpu.name)
    file.parent.mkdir(parents=True)
    names = [tables.key(4, rows, 64, 256, 128, False, torch.bfloat16) for rows in (4, 1024)]
    file.write_text(json.dumps({"measured": {name: tables.entry(ONE_ROW, 12.5) for name in names}}))
    tables.table.cache_clear()
    assert choose(3) == choose(1000) == ONE_ROW
    # Other rows, zero points, another dtype, more rows than any table has, another Triton: nobody measured that.
    assert ONE_ROW not in (choose(5), choose(3, True), choose(3, dtype=torch.float16), choose(1025))
    monkeypatch.setattr(tables.triton, "__version__", "2.0.1")
    assert choose(3) == rule(gpu, 4, 3, 64, 256, 128)
    file.write_text("{")
    tables.table.cache_clear()
    with pytest.raises(ValueError, match="llmq tune"):
        choose(3)
    tables.table.cache_clear()


def test_a_configuration_that_does_not_fit_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton.runtime.errors import OutOfResources

    tried = []

    def start(one: Launch) -> None:
        tried.append(one)
        raise OutOfResources(300000, 232448, "shared memory")

    weight = plain(21, 300, 4, 128, symmetric=False)
    form = packed(weight, torch.bfloat16)
    use(monkeypatch, FEW_ROWS)
    whole = launching.start
    monkeypatch.setattr(launching, "start", lambda one: start(one) if "WARPS_K" in one.constexprs else whole(one))
    for _ in range(2):
        check(weight, form, torch.randn(2, 300).to(torch.bfloat16), None)
    assert len(tried) == 1 and "does not fit" in caplog.text


def test_a_launch_is_repeated_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first, what was compiled is called with the same values in the kernel's order, and the new tensors;
    an address that is no multiple of 16 goes to Triton again."""
    calls: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *values: calls.append((grid, *values))

    class Kernel:
        arg_names = ("x", "y", "M", "N", "BITS", "PDL")

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*values: Any, **named: Any) -> Any:
                calls.append((grid, *values, named))
                return Compiled()

            return run

    x, y = torch.zeros(64), torch.zeros(64)
    once = launching.Repeated()

    def go(rows: int, x: Tensor) -> None:
        made = launching.Launch(Kernel(), (rows, 1, 1), (x, y, rows, 7), {"PDL": False, "BITS": 4}, {"num_warps": 2})
        once((rows, 1, 1), (x, y), rows, lambda: made)

    for rows, tensor in ((3, x[1:]), (3, x), (5, x), (6, x[2:]), (7, x)):
        go(rows, tensor)
    told = {"PDL": False, "BITS": 4, "num_warps": 2}
    assert [len(call) for call in calls] == [6, 6, 7, 6, 7]
    assert calls[2][0] == (5, 1, 1) and calls[2][3:] == (5, 7, 4, False) and calls[1][-1] == told
    assert calls[4][3] == 7 and calls[3][1] is not x


@pytest.mark.parametrize("processors", [16, 46, 78, 108, 114, 132, 142, 148, 170, 304])
def test_the_rule_keeps_every_number_of_multiprocessors_busy(processors: int) -> None:
    """With 4 bits at 32 to 512 rows, where there is work for all: programs for four fifths of them, or K split enough
    that each has four tiles."""
    gpu = replace(KNOWN[2], processors=processors)
    for n, k in ((4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336)):
        for m in (32, 64, 128, 256, 512):
            config = rule(gpu, 4, m, n, k, 128)
            programs = -(-n // config.block_n) * -(-m // config.block_m) * config.programs_k
            assert config.family == "many_rows" and programs >= 0.8 * processors
            assert k // planes.TILE[4] >= 4 * config.programs_k


def test_stacked_experts_are_dequantized_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs are on the first axis of the grid: the others hold 65,535."""
    from llmq_kernels.triton import dequantize

    n, k, meta = 256 * 4096, 2048, torch.device("meta")
    stacked = torch.empty(n, k // 4, dtype=torch.int16, device=meta), torch.empty(k // 128, n, device=meta)
    weight = PackedInt(*stacked, None, 4, n, k, 128)
    made = dequantize.build(weight, torch.empty(n, k, device=meta), "cuda")
    assert made.grid == (16 * n // 16,)
