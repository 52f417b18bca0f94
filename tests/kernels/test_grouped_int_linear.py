"""The grouped product on a CPU: the twin, every layout, gradients, and errors instead of wrong numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401
from llmq_kernels.grouped_int_linear import reference
from llmq_kernels.grouped_int_linear.route import Routing, sort, unsorted
from llmq_kernels.int_linear import layouts
from llmq_kernels.int_linear.layouts import DENSE_BITS
from tests.kernels.weights import Plain, plain, tolerance

EXPERTS, OUT, WIDTH, GROUP = 5, 12, 128, 32
# Experts without rows first, in between and last, and two rows that belong to none.
SORTED = Routing(torch.tensor([0, 3, 3, 10, 10], dtype=torch.int32))
# Some experts chosen twice, some never, and one that there is not.
PAIRS = Routing(chosen=torch.tensor([[1, 4], [4, 3], [1, 5], [3, -1]]))
ROWS = 12


def weights(bits: int, symmetric: bool) -> list[Plain]:
    return [plain(OUT, WIDTH, bits, GROUP, symmetric=symmetric, seed=e) for e in range(EXPERTS)]


def rows(routing: Routing) -> int:
    """Of x."""
    return ROWS if routing.chosen is None else len(routing.chosen)


def arguments(experts: list[Plain], x: Tensor, bias: Tensor | None, routing: Routing, layout: str) -> tuple[Any, ...]:
    """What grouped_int_linear takes."""
    bits = experts[0].bits
    packed = [layouts.pack(layout, w.words, w.scale, w.zero, bits, WIDTH, GROUP, x.dtype) for w in experts]
    codes, scales, zeros = zip(*packed, strict=True)
    weight = torch.stack(codes), torch.stack(scales), None if zeros[0] is None else torch.stack(zeros)
    return (x, *weight, bias, routing.offs, routing.chosen, bits, OUT, WIDTH, GROUP, layout)


def exact(experts: list[Plain], x: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The product row by row in float64, and what it may be off by."""
    count = routing.rows(x)
    y, allowed = torch.zeros(count, OUT, dtype=torch.float64), torch.zeros(count, OUT, dtype=torch.float64)
    for row in range(count):
        e, one = reference.expert_of(routing, row), x[row // routing.choices]
        if 0 <= e < EXPERTS:
            y[row] = experts[e].dense @ one.double() + (0 if bias is None else bias[e].double())
            allowed[row] = tolerance(one[None], experts[e].dense)[0]
    return y, allowed + torch.finfo(x.dtype).eps * y.abs()


@pytest.mark.parametrize("routing", [SORTED, PAIRS], ids=["sorted", "pairs"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_twin_and_every_layout_are_the_float64_product(symmetric: bool, biased: bool, routing: Routing) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(EXPERTS, OUT, generator=generator) if biased else None
    for bits in (2, 3, 4, 8):
        experts = weights(bits, symmetric)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows(routing), WIDTH, generator=generator).to(dtype)
            expected, allowed = exact(experts, x, bias, routing)
            zero = None if symmetric else torch.stack([w.zero for w in experts if w.zero is not None])
            words, scale = torch.stack([w.words for w in experts]), torch.stack([w.scale for w in experts])
            twin = reference.grouped_int_linear(x, words, scale, zero, bias, routing, bits, GROUP)
            assert twin.dtype == dtype and ((twin.double() - expected).abs() <= allowed).all()
            for layout in (DENSE_BITS, "int4pack") if bits <= 4 else (DENSE_BITS,):
                got = torch.ops.llmq.grouped_int_linear(*arguments(experts, x, bias, routing, layout))
                assert got.dtype == dtype and ((got.double() - expected).abs() <= allowed).all(), (bits, layout)
                assert not got[expected.eq(0).all(1)].any(), "rows of no expert are zero"


@pytest.mark.slow
@pytest.mark.parametrize("routing", [SORTED, PAIRS], ids=["sorted", "pairs"])
def test_opcheck_and_gradient(routing: Routing) -> None:
    experts = weights(4, False)
    x = torch.randn(rows(routing), WIDTH, requires_grad=True)
    whole = arguments(experts, x, torch.randn(EXPERTS, OUT), routing, DENSE_BITS)
    torch.library.opcheck(torch.ops.llmq.grouped_int_linear.default, whole)
    grad = torch.randn(routing.rows(x), OUT)
    torch.library.opcheck(torch.ops.llmq.grouped_int_linear_grad.default, (grad, *whole[1:4], *whole[5:]))
    wanted = torch.zeros(rows(routing), WIDTH, dtype=torch.float64)
    for row in range(len(grad)):
        e = reference.expert_of(routing, row)
        if 0 <= e < EXPERTS:
            wanted[row // routing.choices] += grad[row].double() @ experts[e].dense
    for layout in (DENSE_BITS, "int4pack"):
        x.grad = None
        (torch.ops.llmq.grouped_int_linear(*arguments(experts, x, None, routing, layout)) * grad).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_has_no_gradient() -> None:
    whole = list(arguments(weights(4, True), torch.randn(ROWS, WIDTH), None, SORTED, DENSE_BITS))
    with pytest.raises(NotImplementedError, match="biases of packed experts are frozen"):
        torch.ops.llmq.grouped_int_linear(*whole[:4], torch.randn(EXPERTS, OUT, requires_grad=True), *whole[5:])
    whole[2] = whole[2].float().requires_grad_()
    with pytest.raises(NotImplementedError, match="scale of a low-bit weight is frozen"):
        torch.ops.llmq.grouped_int_linear(*whole)


def test_wrong_arguments_are_errors() -> None:
    whole = list(arguments(weights(4, True), torch.randn(ROWS, WIDTH), None, SORTED, DENSE_BITS))
    pairs = list(arguments(weights(4, True), torch.randn(4, WIDTH), None, PAIRS, DENSE_BITS))
    assert SORTED.offs is not None and PAIRS.chosen is not None

    def raises(error: type[Exception], match: str, at: int, value: Any, given: list[Any] = whole) -> None:
        with pytest.raises(error, match=match):
            torch.ops.llmq.grouped_int_linear(*given[:at], value, *given[at + 1 :])

    raises(ValueError, "takes inputs", 0, torch.randn(ROWS, WIDTH + 1))
    raises(ValueError, "grouped product takes rows", 0, torch.randn(2, 6, WIDTH))
    raises(TypeError, "input must be", 0, torch.zeros(ROWS, WIDTH, dtype=torch.int64))
    raises(ValueError, "axis for experts", 1, whole[1][0])
    raises(TypeError, "offs must be torch.int32", 5, SORTED.offs.long())
    raises(ValueError, "offs must be", 5, SORTED.offs[1:])
    raises(ValueError, "must ascend", 5, torch.tensor([0, 4, 3, 10, 12], dtype=torch.int32))
    raises(ValueError, "at most 12 rows, but 13", 5, torch.tensor([0, 3, 3, 10, 13], dtype=torch.int32))
    raises(ValueError, "not both", 5, None)
    raises(ValueError, "not both", 6, PAIRS.chosen)
    raises(TypeError, "chosen must be torch.int32 or torch.int64", 6, PAIRS.chosen.float(), pairs)
    raises(ValueError, "chosen must be", 6, PAIRS.chosen.view(2, 4), pairs)
    raises(ValueError, "chosen must be", 6, PAIRS.chosen.view(-1), pairs)
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
    got = torch.ops.llmq.grouped_int_linear(*arguments(experts, x, bias, Routing(offsets), layout))
    assert seen == [48, 64, 64, 96]
    assert not got[sum(counts) :].any() and got.shape == (260, OUT)
    start = 0
    for expert, count in enumerate(counts):
        dense = experts[expert].dense.float()
        part = slice(start, start + count)
        assert torch.allclose(got[part], x[part] @ dense.t() + bias[expert], atol=1e-3)
        start += count


def test_sorting_pairs() -> None:
    assert PAIRS.chosen is not None
    order, offsets = sort(PAIRS.chosen, EXPERTS)
    assert order.tolist() == [0, 4, 3, 6, 1, 2, 5, 7] and offsets.tolist() == [0, 2, 2, 4, 6]
    assert offsets.dtype == torch.int32


def test_when_pairs_are_not_sorted() -> None:
    """One token, whose experts differ; some, if hardly two of them choose the same."""
    assert unsorted(1, 8, 8) and unsorted(8, 8, 128)
    assert not unsorted(2, 2, 7) and not unsorted(9, 8, 128)
