"""The module that stands for the parameter of all experts: an operand of products, and of nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmq.errors import LlmqError
from llmq.formats.plain import CodebookWeight, IntWeight, Weight
from llmq.inference.linear import quant_linear
from llmq.inference.stack import PackedStack, StackedLinear, joined, packed_stack
from tests.kernels.weights import plain
from tests.llmq.refusal import refused

EXPERTS, OUT, WIDTH = 3, 32, 64


def weight(
    seed: int, out: int = OUT, *, width: int = WIDTH, bits: int = 4, symmetric: bool = True, order: bool = False
) -> IntWeight:
    made = plain(out, width, bits, 32, symmetric=symmetric, seed=seed, dtype=torch.float32)
    permuted = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).int() if order else None
    return IntWeight(made.words, made.scale, made.zero, bits, width, 32, permuted)


def values(part: IntWeight) -> Tensor:
    """The dense matrix, by the layer of one weight alone."""
    return quant_linear(part, None, torch.float32)(torch.eye(part.in_features)).t()


def stack(transposed: bool = False, **options: Any) -> tuple[PackedStack, Tensor]:
    """Experts of two parts each, and the parameter that they stand for, [experts, 64, 64] or [experts, in, out]."""
    experts: list[list[Weight]] = [[weight(2 * e, **options), weight(2 * e + 1, **options)] for e in range(EXPERTS)]
    dense = torch.stack([torch.cat([values(part) for part in rows]) for rows in experts])  # type: ignore[arg-type]
    dense = dense.mT.contiguous() if transposed else dense
    return packed_stack("m.stack", tuple(dense.shape), transposed, experts, torch.float32, "file"), dense


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


OPTIONS: list[dict[str, Any]] = [{}, {"symmetric": False}, {"order": True}, {"bits": 8}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_the_parameter(options: dict[str, Any], transposed: bool) -> None:
    packed, dense = stack(transposed, **options)
    assert (packed.shape, packed.dim(), packed.size(0), len(packed)) == (dense.shape, 3, EXPERTS, EXPERTS)
    assert (packed.dtype, packed.device) == (dense.dtype, dense.device)
    x, bias = torch.randn(2, 5, WIDTH), torch.randn(2 * OUT)
    for e in (0, torch.tensor(2), -1):
        one, plain_one = (packed[e].T, dense[e].T) if transposed else (packed[e], dense[e])
        assert one.shape == plain_one.shape and one.dim() == 2
        same(functional.linear(x, one), functional.linear(x, plain_one))  # type: ignore[arg-type]
        same(functional.linear(x, one, bias), functional.linear(x, plain_one, bias))  # type: ignore[arg-type]
        same(x @ one.t(), x @ plain_one.t())  # type: ignore[operator]
        same(torch.matmul(x, one.mT), x @ plain_one.mT)  # type: ignore[arg-type]
        same(torch.mm(x[0], one.transpose(0, 1)), x[0] @ plain_one.t())  # type: ignore[arg-type]
    whole, plain_whole = (packed.view(), dense) if transposed else (packed.transpose(-2, -1), dense.mT)
    rows = torch.randn(EXPERTS, 4, WIDTH)
    same(torch.bmm(rows, whole), rows @ plain_whole)  # type: ignore[arg-type]
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    grouped = torch.cat([x[0, :2] @ plain_whole[0], x[0, 2:] @ plain_whole[2], x[1, :1] @ plain_whole[2]])
    flat = torch.cat([x[0], x[1, :1]])
    same(functional.grouped_mm(flat, whole, offs=offsets), grouped)  # type: ignore[arg-type]
    same(packed.sorted_product(flat, offsets), grouped)
    biases = torch.randn(EXPERTS, 2 * OUT)
    same(packed.sorted_product(flat, offsets, biases), grouped + biases[[0, 0, 2, 2, 2, 2]])


def test_a_parameter_itself_is_an_operand() -> None:
    packed, dense = stack(True)
    rows = torch.randn(EXPERTS, 4, WIDTH)
    same(torch.bmm(rows, packed), rows @ dense)  # type: ignore[arg-type]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_below_each_other_are_told_apart_by_a_view(transposed: bool) -> None:
    packed, dense = stack(transposed)
    count, rows, columns = dense.shape
    flat, x = dense.reshape(count * rows, columns), torch.randn(5, WIDTH)
    for shape in ((-1, rows, columns), ((count, -1, columns),), (count, rows, -1)):
        for e in range(count):
            one, plain = packed.view(*shape)[e], flat.view(*shape)[e]
            assert one.shape == plain.shape
            wanted = x @ (plain if transposed else plain.T)
            same(x.matmul(one if transposed else one.T), wanted)  # type: ignore[arg-type]
    for wrong in ((count * rows, columns), (-1, columns, rows + 1), (2, -1, columns)):
        refused(lambda wrong=wrong: packed.view(*wrong), "m.stack is packed", "view(")  # type: ignore[misc]


def test_anything_else_is_refused_with_the_way_out() -> None:
    packed, _ = stack()
    x: Any = torch.randn(5, WIDTH)
    calls: list[Any] = [
        lambda: packed[torch.tensor([0, 1])],
        lambda: packed[0:2],
        lambda: packed[0][0],
        lambda: packed.transpose(0, 1),
        lambda: packed[0] + x,
        lambda: torch.add(x, packed),  # type: ignore[arg-type]
        lambda: functional.linear(x, packed[0].T),  # type: ignore[arg-type]
        lambda: torch.bmm(x[None].expand(2, -1, -1), packed.mT),  # type: ignore[arg-type]
        lambda: torch.stack([packed[0], packed[1]]),  # type: ignore[list-item]
    ]
    for call in calls[:4] + calls[5:6] + calls[7:8]:
        refused(call, "m.stack is packed", "set_experts_implementation('eager')")
    for call in calls:
        with pytest.raises((LlmqError, TypeError, ValueError)):
            call()
    with pytest.raises(IndexError, match="3 experts"):
        packed[3]
    with pytest.raises(ValueError, match="does not multiply"):
        functional.linear(torch.randn(5, WIDTH + 1), packed[0])  # type: ignore[arg-type]


def test_a_gradient_reaches_the_rows() -> None:
    packed, dense = stack()
    x = torch.randn(6, WIDTH, requires_grad=True)
    offsets = torch.tensor([1, 4, 6], dtype=torch.int32)
    packed.sorted_product(x, offsets).sum().backward()
    assert x.grad is not None
    same(x.grad, dense.sum(1)[[0, 1, 1, 1, 2, 2]])
    x.grad = None
    functional.linear(x, packed[1]).sum().backward()  # type: ignore[arg-type]
    same(x.grad, dense[1].sum(0).expand(6, -1))  # type: ignore[arg-type]


def test_copies_and_moves() -> None:
    packed, dense = stack()
    twin = copy.deepcopy(packed)
    for buffer in packed.buffers():
        buffer.zero_()
    x: Any = torch.randn(5, WIDTH)
    same(functional.linear(x, twin[1]), x @ dense[1].t())  # type: ignore[arg-type]
    assert packed.to("cpu", torch.float32) is packed
    refused(lambda: packed.to(torch.bfloat16), "cannot be moved", "load the folder again")
    loose, dense = stack(bits=8)
    assert loose.to(torch.float64).dtype == torch.float64 and not list(loose.parameters())
    assert "experts=3" in repr(loose)


def test_rows_are_joined_only_if_one_layer_can_run_them() -> None:
    one, other = weight(0), weight(1, 16)
    both = joined([one, other])
    assert isinstance(both, IntWeight) and both.words.shape[0] == 48 and both.zero is None
    same(values(both), torch.cat([values(one), values(other)]))
    mixed = joined([one, weight(2, symmetric=False)])
    assert isinstance(mixed, IntWeight)
    same(values(mixed), torch.cat([values(one), values(weight(2, symmetric=False))]))
    assert joined([weight(0, order=True)]) is not None
    assert joined([weight(0, order=True), one]) is None
    assert joined([one, weight(1, bits=8)]) is None
    block = CodebookWeight(torch.zeros(1024), torch.ones(32), torch.ones(16), None, None, 0.0, OUT, WIDTH, 64)
    assert joined([block, block]) is None


def test_experts_differ_only_in_zero_points_and_order() -> None:
    """Readers leave out zero points that are all 0, and an order that is none: an expert at a time."""
    experts = [weight(0), weight(1, symmetric=False), weight(2, order=True)]
    lists: list[list[Weight]] = [[e] for e in experts]
    packed = packed_stack("m", (3, OUT, WIDTH), False, lists, torch.float32, "file")
    x: Any = torch.randn(5, WIDTH)
    for e, one in enumerate(experts):
        same(functional.linear(x, packed[e]), x @ values(one).t())  # type: ignore[arg-type]
    assert not packed.routes()
    with pytest.raises(LlmqError, match="stored alike"):
        packed_stack("m", (2, OUT, WIDTH), False, [[weight(0)], [weight(1, bits=8)]], torch.float32, "file")
    with pytest.raises(LlmqError, match="stored alike"):
        packed_stack(
            "m", (2, 64, WIDTH), False, [[weight(0, 64)], [weight(0), weight(1, bits=8)]], torch.float32, "file"
        )
    layer = quant_linear(weight(0), None, torch.float32)
    with pytest.raises(LlmqError, match="stored alike"):
        StackedLinear(2, layer).put(1, quant_linear(weight(0, 16), None, torch.float32))
