"""Bytes that select vectors: the operator against its twin, and the twin against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401
from llmq_kernels.vectors_linear import cpu as vectors_cpu
from llmq_kernels.vectors_linear import reference as vectors_reference
from llmq_kernels.weights import PackedVectors

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def packed(out: int, width: int, groups: int, n: int, books: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out)
    count = -(-(width // groups) // n)
    codes = torch.randint(0, 256, (books, groups, count, out), dtype=torch.uint8, generator=generator)
    table = torch.randn(books, 256, n, generator=generator)
    return codes, table, torch.rand(groups, out, generator=generator).to(torch.bfloat16)


SHAPES = [(1, 1, 1, 5, 1), (7, 33, 1, 5, 1), (33, 128, 2, 5, 1), (300, 4100, 4, 8, 1), (16, 64, 1, 8, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width", "groups", "n", "books"), SHAPES)
def test_the_operator_is_its_twin(out: int, width: int, groups: int, n: int, books: int, dtype: torch.dtype) -> None:
    codes, table, scale = packed(out, width, groups, n, books)
    bias = torch.randn(out).to(dtype)
    dense = vectors_reference.vectors_dequantize(codes, table, scale, width)
    size = width // groups
    for row, column in ((0, 0), (out - 1, width - 1), (out // 2, width // 2)):
        group, within = divmod(column, size)
        picked = sum(float(table[m, int(codes[m, group, within // n, row]), within % n]) for m in range(books))
        assert dense[row, column].item() == pytest.approx(picked * float(scale[group, row]), rel=1e-6)
    weight = PackedVectors(codes, table, scale, out, width)
    torch.testing.assert_close(vectors_cpu.dequantize(weight, torch.float32), dense, rtol=1e-6, atol=1e-7)
    for shape in ((1, width), (3, width), (2, 5, width)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = torch.ops.llmq.vectors_linear(x, codes, table, scale, bias, out, width)
        torch.testing.assert_close(
            got, vectors_reference.vectors_linear(x, codes, table, scale, bias), rtol=2e-2, atol=0.5
        )
        exact = x.double() @ dense.double().t() + bias.double()
        bound = x.double().abs() @ dense.double().abs().t() + 1
        assert got.dtype == dtype and ((got.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * bound).all()


def test_gradients_and_tracing() -> None:
    codes, table, scale = packed(12, 66, 3, 5, 1)
    x = torch.randn(2, 3, 66, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    operator = torch.ops.llmq.vectors_linear
    torch.library.opcheck(operator.default, (x, codes, table, scale, bias, 12, 66), test_utils=CHECKS)
    dense = vectors_reference.vectors_dequantize(codes, table, scale, 66)
    operator(x, codes, table, scale, bias, 12, 66).sum().backward()
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))
    torch.testing.assert_close(bias.grad, torch.full((12,), 6.0))
    with pytest.raises(NotImplementedError, match="frozen"):
        operator(x, codes, table.clone().requires_grad_(), scale, None, 12, 66)


def test_what_does_not_fit_is_refused() -> None:
    codes, table, scale = packed(8, 64, 2, 5, 1)
    x = torch.randn(1, 64)
    for wrong in ((codes[:, :, :-1], table, scale), (codes, table[:, :8], scale), (codes, table, scale[:1])):
        with pytest.raises(ValueError, match="must be"):
            torch.ops.llmq.vectors_linear(x, *wrong, None, 8, 64)
    with pytest.raises(ValueError, match="3 groups do not divide 64"):
        torch.ops.llmq.vectors_linear(x, codes, table, scale[:1].expand(3, -1), None, 8, 64)
    assert torch.ops.llmq.vectors_linear(x[:0], codes, table, scale, None, 8, 64).shape == (0, 8)
