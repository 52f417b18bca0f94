"""A dry run has the shapes, the dtypes and the failures of a real one, and costs neither time nor memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmq.discovery.dry import LARGEST_LOOKUP, without_arithmetic
from llmq.machine import peak_memory


def attention(x: Tensor) -> Tensor:
    q = x.view(1, -1, 4, 16).transpose(1, 2)
    scores = (q @ q.transpose(2, 3)).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -1e9)
    return (scores.softmax(-1, dtype=torch.float64) @ q.double()).transpose(1, 2).reshape(x.shape)


def in_place(x: Tensor) -> Tensor:
    out = torch.zeros(2, *x.shape)
    out[1] = x
    out.mul_(2)[0].add_(x)
    return out


def choose(x: Tensor) -> tuple[Tensor, ...]:
    values, places = x.topk(3, -1)
    return values, places, x.gather(-1, places), x.argmax(-1), functional.one_hot(places, 64)


def several(x: Tensor) -> list[Tensor]:
    return [*x.split(16, -1), *x.unbind(1)[:2], torch.complex(x, x), torch.fft.rfft(x)]


CALLS: list[Callable[[Tensor], object]] = [attention, in_place, choose, several]
CALLS += [lambda x: functional.scaled_dot_product_attention(x, x, x), lambda x: (x.half(), x > 0, x.new_ones(3))]


def shapes(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device.type
    return [shapes(part) for part in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("call", CALLS)
def test_shapes_and_dtypes_are_those_of_a_real_run(call: Callable[[Tensor], object]) -> None:
    x = torch.randn(1, 20, 64)
    before = x.clone()
    with without_arithmetic():
        dry = shapes(call(x))
    assert dry == shapes(call(x))
    assert torch.equal(x, before)


WRONG: dict[str, Callable[[Tensor], object]] = {
    "bias": lambda x: x + torch.ones(1, 19, 64),
    "product": lambda x: x @ torch.ones(63, 2),
    "view": lambda x: x.view(1, 7, -1),
    "embedding": lambda x: functional.embedding(torch.arange(20), torch.ones(19, 4)),
    "index": lambda x: x[0, torch.arange(21)],
    "gather": lambda x: x.gather(1, torch.full((1, 1, 64), 20)),
    "select": lambda x: x.index_select(1, torch.tensor([20])),
    "integers": lambda x: torch.arange(x.shape[1])[torch.tensor([20])],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_fails_in_a_real_run_fails(name: str) -> None:
    x = torch.randn(1, 20, 64)
    with pytest.raises((RuntimeError, IndexError)) as real:
        WRONG[name](x)
    with pytest.raises(real.type), without_arithmetic():
        WRONG[name](x)


def test_integers_and_booleans_are_computed() -> None:
    with without_arithmetic():
        places = torch.arange(5).cumsum(0)[torch.tensor([True, False, True, True, False])]
    assert places.tolist() == [0, 3, 6]


def test_numbers_are_zeros_and_can_be_asked() -> None:
    with without_arithmetic():
        y = torch.ones(3, 4) * 2
        assert not y.any() and float(y.sum()) == 0 and torch.equal(y, y) and y.tolist() == [[0.0] * 4] * 3
        assert float(torch.tensor(2.0) + 1) == 3  # a single number is computed


def test_neither_time_nor_memory() -> None:
    began, before = time.perf_counter(), peak_memory()
    with without_arithmetic():
        x = functional.linear(torch.ones(1, 1, 1).expand(1, 100_000, 8192), torch.ones(1, 1).expand(8192, 8192))
        scores = x.view(1, -1, 64, 128).transpose(1, 2) @ x.view(1, -1, 64, 128).permute(0, 2, 3, 1)
        assert scores.softmax(-1).shape == (1, 64, 100_000, 100_000)
        large = functional.embedding(torch.zeros(1, dtype=torch.long).expand(LARGEST_LOOKUP), torch.ones(2, 64))
        assert large.shape == (LARGEST_LOOKUP, 64)
    assert time.perf_counter() - began < 5
    assert peak_memory() - before < 2**30
