"""Products of what a model computes: as exact as float32's, whatever units compute them."""

from __future__ import annotations

import pytest
import torch

from llmq.block.moments import Apart, Moments
from llmq.block.products import fast
from llmq.block.statistics import Hessian

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WIDTH = 700


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def inputs(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Tokens with channels of very different sizes, [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(900, WIDTH, generator=generator) * torch.logspace(-2, 2, WIDTH)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hessian_is_as_exact_as_float32_for_every_dtype(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    hessian = Hessian(WIDTH, CPU)
    for part in x.split(256):
        hessian.update(part)
    assert relative(hessian.total, x.double().t() @ x.double()) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_are_sums_of_differences(dtype: torch.dtype) -> None:
    """On units for bfloat16 a difference, which is float32, has 8 bits of mantissa: independent errors of 1/512."""
    x, drift = inputs(dtype), torch.randn(900, WIDTH, generator=torch.Generator().manual_seed(1))
    moments = Moments(WIDTH, [], CPU)
    moments.update([Apart(x, drift, {}, frozenset())])
    assert moments.drift is not None
    assert relative(moments.drift, drift.double().t() @ x.double()) < (3e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize(
    ("dtype", "device", "inside"),
    [
        (torch.float32, CPU, "highest"),
        (torch.float16, CPU, "highest"),
        (torch.bfloat16, CPU, "medium"),
        (torch.float32, GPU, "highest"),
        (torch.float16, GPU, "high"),
        (torch.bfloat16, GPU, "high"),
        (torch.bfloat16, torch.device("meta"), "highest"),
    ],
)
def test_only_what_fewer_bits_hold_is_computed_in_them(dtype: torch.dtype, device: torch.device, inside: str) -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), fast(dtype, device):
        assert torch.get_float32_matmul_precision() == inside
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_a_precision_that_was_set_in_another_way_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("PyTorch is checking whether a mix of the legacy and new APIs is used")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    x = inputs(torch.bfloat16)
    hessian = Hessian(WIDTH, CPU)
    hessian.update(x)
    assert relative(hessian.total, x.double().t() @ x.double()) < 3e-6
