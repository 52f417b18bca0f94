"""Runs that begin as an earlier one did: what is kept is used, and nothing that may have another value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmq.discovery.addends import see
from llmq.discovery.replay import Replay
from llmq.discovery.view import View

WIDTH = 4


class Chain(torch.nn.Module):
    """Three weights, one after the other; `a` is changed in place behind its product, if asked for."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        for name in "abc":
            self.register_parameter(name, torch.nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.a, self.b, self.c):
            y = torch.nn.functional.linear(x, weight)
            if self.inplace and weight is self.a:
                y.tanh_()
            x = x + y
        return x


class Counted(TorchFunctionMode):
    """Counts products; entered first, it sees those that are really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


def run(module: Chain, x: Tensor, replay: Replay | None, closed: str) -> tuple[Tensor, int]:
    """The output and the number of products computed, of a run in which the weights from `closed` on may change."""
    outputs: list[Tensor] = []
    views = [View(name) for name in "abc" if name >= closed]
    within: AbstractContextManager[object] = nullcontext() if replay is None or views else replay
    with torch.no_grad(), Counted() as counted, within:
        if views:
            see(module, views[:1], lambda: outputs.append(module(x)), None, replay, views)
        else:
            outputs.append(module(x))
    return outputs[0], counted.products


def test_products_before_what_changes_are_computed_once() -> None:
    module, x, replay = Chain(), torch.randn(3, WIDTH), Replay(1 << 20)
    computed = []
    for name in "abcd":
        found, products = run(module, x, replay, name)
        assert torch.equal(found, run(module, x, None, "d")[0])
        computed.append(products)
        if name < "d":
            getattr(module, name).mul_(2)
    assert computed == [3, 3, 2, 1]


def test_what_does_not_fit_or_was_changed_in_place_is_computed_again() -> None:
    x = torch.randn(3, WIDTH)
    for module, replay, wanted in ((Chain(True), Replay(1 << 20), [3, 3]), (Chain(), Replay(3 * WIDTH * 4), [3, 2])):
        computed = []
        for _ in range(2):
            found, products = run(module, x, replay, "d")
            assert torch.equal(found, run(module, x, None, "d")[0])
            computed.append(products)
        assert computed == wanted


def test_a_run_that_takes_another_way_computes_its_own() -> None:
    """Another product, or one of another shape, stands where a kept one did."""
    x, weight, replay = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), Replay(1 << 20)
    with torch.no_grad():
        with replay:
            first = torch.nn.functional.linear(x, weight)
        with replay:
            assert torch.nn.functional.linear(x, weight) is first
        with replay:
            torch.testing.assert_close(torch.matmul(x, weight), x @ weight)
        with replay:
            assert torch.nn.functional.linear(x[:2], weight).shape == (2, WIDTH)
