"""A column's change reaches every later column before that one's turn, in parts as one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmq.grids.base import QuantizedWeight, Rounding, rounding_of
from llmq.grids.scheme import Scheme
from llmq.numerics import columns, descent, gptq
from llmq.numerics.columns import compensate

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 5, 6, 13])
def test_parts_give_what_single_columns_give(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "INNER", 3)
    block, coefficients = torch.randn(count, 4, dtype=torch.float64), torch.randn(count, count, dtype=torch.float64)
    wanted, found = block.clone(), block.clone()
    changes = torch.full_like(block, torch.nan)
    for k in range(count):
        torch.testing.assert_close(found[k], wanted[k])
        changes[k] = wanted[k].sin()
        wanted[k + 1 :] -= torch.outer(coefficients[k, k + 1 :], changes[k])
        compensate(found, coefficients, changes, k)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in Triton's interpreter, as on a GPU."""
    pytest.importorskip("triton")
    from llmq_kernels.triton import columns as found

    def kernels_for(rounding: Rounding, scheme: Scheme, device: torch.device) -> columns.Kernels | None:
        limits = rounding.whole(scheme)
        return None if limits is None else columns.Kernels(found, found.COLUMNS, *limits)

    for module in (gptq, descent):
        monkeypatch.setattr(module, "kernels_for", kernels_for)


@pytest.mark.parametrize(
    ("scheme", "block_size", "act_order"),
    [
        (Scheme(4, 32), 128, "grouped"),
        (Scheme(4, 32), 128, "static"),
        (Scheme(4, 96), 128, "none"),
        (Scheme(3, 64, False), 32, "grouped"),
        (Scheme(2, 16, False), 128, "none"),
        (Scheme(8, None, False), 150, "static"),
        (Scheme(4, 32, grid="q4_0"), 128, "grouped"),
        (Scheme(4, 192), 512, "none"),
    ],
    ids=str,
)
def test_kernels_solve_as_well_as_torch(
    scheme: Scheme, block_size: int, act_order: str, request: pytest.FixtureRequest
) -> None:
    """Not bit for bit: what is subtracted from a column is added up in another order."""
    generator = torch.Generator().manual_seed(0)
    width = 576 if scheme.group_size == 192 else 192
    x = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator) * 0.1
    weight, hessian = torch.randn(20, width, generator=generator) * 0.1, x.t() @ x
    given = {"act_order": act_order, "block_size": block_size, "sweeps": 2}
    one = gptq.solve(weight, hessian.clone(), scheme, **given)  # type: ignore[arg-type]
    request.getfixturevalue("kernels")
    other = gptq.solve(weight, hessian.clone(), scheme, **given)  # type: ignore[arg-type]

    def loss(q: QuantizedWeight) -> float:
        error = weight.double() - q.dequantize(torch.float32).double()
        return float(((error @ hessian.double()) * error).sum())

    assert loss(other) == pytest.approx(loss(one), rel=0.03)
    assert float((one.codes != other.codes).float().mean()) < 0.2


def test_only_grids_of_whole_numbers_have_kernels() -> None:
    for scheme, limits in (
        (Scheme(4, 32), (-8, 7)),
        (Scheme(2, 32, False), (-2, 1)),
        (Scheme(4, 16, grid="nvfp4"), None),
        (Scheme(4, 64, grid="nf4"), None),
        (Scheme(4, 32, False, "q4_k"), None),
    ):
        assert rounding_of(scheme.rules).whole(scheme) == limits
        assert columns.kernels_for(rounding_of(scheme.rules), scheme, torch.device("cpu")) is None


def test_kernels_that_do_not_compile_are_not_used() -> None:
    def raises(*_: object) -> object:
        raise OSError("no C compiler")

    def wrong(one: torch.Tensor, *_: object) -> object:
        return one * 3, one

    for broken in (raises, wrong):
        module: Any = type("Broken", (), {"round_columns": staticmethod(broken)})
        with pytest.warns(UserWarning, match="columns are rounded one by one"):
            assert not columns.works(module, CPU)


def test_kernels_in_the_interpreter_work() -> None:
    found = pytest.importorskip("llmq_kernels.triton.columns")
    assert columns.works(found, CPU)
