"""The grouped product of sorted rows: the twin, every layout, gradients, and errors instead of wrong numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401
from llmq_kernels import layouts, reference
from llmq_kernels.layouts import DENSE_BITS
from tests.kernels.weights import Plain, plain, tolerance

EXPERTS, OUT, WIDTH, GROUP = 5, 12, 128, 32
# Experts without rows first, in between and last, and two rows that belong to none.
OFFSETS = torch.tensor([0, 3, 3, 10, 10], dtype=torch.int32)
ROWS = 12


def weights(bits: int, symmetric: bool) -> list[Plain]:
    return [plain(OUT, WIDTH, bits, GROUP, symmetric=symmetric, seed=e) for e in range(EXPERTS)]


def arguments(experts: list[Plain], x: Tensor, bias: Tensor | None, layout: str) -> tuple[Any, ...]:
    """What int_grouped takes."""
    bits = experts[0].bits
    packed = [layouts.pack(layout, w.words, w.scale, w.zero, bits, WIDTH, GROUP, x.dtype) for w in experts]
    codes, scales, zeros = zip(*packed, strict=True)
    zero = None if zeros[0] is None else torch.stack(zeros)
    return (x, torch.stack(codes), torch.stack(scales), zero, bias, OFFSETS, bits, OUT, WIDTH, GROUP, layout)


def exact(experts: list[Plain], x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product row by row in float64, and what it may be off by."""
    y, allowed = torch.zeros(ROWS, OUT, dtype=torch.float64), torch.zeros(ROWS, OUT, dtype=torch.float64)
    for row in range(int(OFFSETS[-1])):
        e = int((row >= OFFSETS).sum())
        y[row] = experts[e].dense @ x[row].double() + (0 if bias is None else bias[e].double())
        allowed[row] = tolerance(x[row : row + 1], experts[e].dense)[0]
    return y, allowed + torch.finfo(x.dtype).eps * y.abs()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_twin_and_every_layout_are_the_float64_product(symmetric: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(EXPERTS, OUT, generator=generator) if biased else None
    for bits in (2, 3, 4, 8):
        experts = weights(bits, symmetric)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
            expected, allowed = exact(experts, x, bias)
            zero = None if symmetric else torch.stack([w.zero for w in experts if w.zero is not None])
            words, scale = torch.stack([w.words for w in experts]), torch.stack([w.scale for w in experts])
            twin = reference.int_grouped(x, words, scale, zero, bias, OFFSETS, bits, GROUP)
            assert twin.dtype == dtype and ((twin.double() - expected).abs() <= allowed).all()
            for layout in (DENSE_BITS, "int4pack") if bits <= 4 else (DENSE_BITS,):
                got = torch.ops.llmq.int_grouped(*arguments(experts, x, bias, layout))
                assert got.dtype == dtype and ((got.double() - expected).abs() <= allowed).all(), (bits, layout)
                assert not got[int(OFFSETS[-1]) :].any(), "rows of no expert are zero"


def test_the_layout_of_gpus() -> None:
    """In Triton's interpreter."""
    experts, x = weights(4, False), torch.randn(ROWS, WIDTH).bfloat16()
    expected, allowed = exact(experts, x, None)
    got = torch.ops.llmq.int_grouped(*arguments(experts, x, None, "planes"))
    assert ((got.double() - expected).abs() <= allowed).all()


@pytest.mark.slow
def test_opcheck_and_gradient() -> None:
    experts = weights(4, False)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    whole = arguments(experts, x, torch.randn(EXPERTS, OUT), DENSE_BITS)
    torch.library.opcheck(torch.ops.llmq.int_grouped.default, whole)
    grad = torch.randn(ROWS, OUT)
    torch.library.opcheck(torch.ops.llmq.int_grouped_grad.default, (grad, *whole[1:4], *whole[5:]))
    for layout in (DENSE_BITS, "int4pack"):
        x.grad = None
        (torch.ops.llmq.int_grouped(*arguments(experts, x, None, layout)) * grad).sum().backward()
        assert x.grad is not None
        for row in range(ROWS):
            e = int((row >= OFFSETS).sum())
            wanted = grad[row].double() @ experts[e].dense if e < EXPERTS else torch.zeros(WIDTH).double()
            torch.testing.assert_close(x.grad[row].double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_has_no_gradient() -> None:
    whole = list(arguments(weights(4, True), torch.randn(ROWS, WIDTH), None, DENSE_BITS))
    with pytest.raises(NotImplementedError, match="biases of packed experts are frozen"):
        torch.ops.llmq.int_grouped(*whole[:4], torch.randn(EXPERTS, OUT, requires_grad=True), *whole[5:])
    whole[2] = whole[2].float().requires_grad_()
    with pytest.raises(NotImplementedError, match="scale of a low-bit weight is frozen"):
        torch.ops.llmq.int_grouped(*whole)


def test_wrong_arguments_are_errors() -> None:
    whole = list(arguments(weights(4, True), torch.randn(ROWS, WIDTH), None, DENSE_BITS))

    def raises(error: type[Exception], match: str, at: int, value: Any) -> None:
        with pytest.raises(error, match=match):
            torch.ops.llmq.int_grouped(*whole[:at], value, *whole[at + 1 :])

    raises(ValueError, "takes inputs", 0, torch.randn(ROWS, WIDTH + 1))
    raises(ValueError, "grouped product takes rows", 0, torch.randn(2, 6, WIDTH))
    raises(TypeError, "input must be", 0, torch.zeros(ROWS, WIDTH, dtype=torch.int64))
    raises(TypeError, "offs must be torch.int32", 5, OFFSETS.long())
    raises(ValueError, "offs must be", 5, OFFSETS[1:])
    raises(ValueError, "must ascend", 5, torch.tensor([0, 4, 3, 10, 12], dtype=torch.int32))
    raises(ValueError, "at most 12 rows, but 13", 5, torch.tensor([0, 3, 3, 10, 13], dtype=torch.int32))
    raises(ValueError, "bias must be", 4, torch.randn(OUT))


@pytest.mark.parametrize("layout", [DENSE_BITS, "int4pack"])
def test_on_a_cpu_many_rows_are_a_multiple_of_sixteen(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps what it compiles for each number of rows."""
    module, seen = layouts.layout(layout), []
    linear = module.linear

    def noted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return linear(x, *rest)

    monkeypatch.setattr(module, "linear", noted)
    counts = [48, 0, 49, 64, 90]
    offsets = torch.tensor(counts, dtype=torch.int32).cumsum(0).to(torch.int32)
    experts, x = weights(4, False), torch.randn(260, WIDTH, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(EXPERTS, OUT, generator=torch.Generator().manual_seed(1))
    x, codes, scales, zero, *_, name = arguments(experts, x, bias, layout)
    got = torch.ops.llmq.int_grouped(x, codes, scales, zero, bias, offsets, 4, OUT, WIDTH, GROUP, name)
    assert seen == [48, 64, 64, 96]
    assert not got[sum(counts) :].any() and got.shape == (260, OUT)
    start = 0
    for expert, count in enumerate(counts):
        dense = experts[expert].dense.float()
        part = slice(start, start + count)
        assert torch.allclose(got[part], x[part] @ dense.t() + bias[expert], atol=1e-3)
        start += count
