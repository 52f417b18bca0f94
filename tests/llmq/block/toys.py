"""Blocks with four weights each, the same numbers and the same function, held in memory in different ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmq.block.block import Block, WeightState
from llmq.discovery.calls import Call
from llmq.discovery.view import View
from llmq.grids.scheme import Scheme

COUNT, OUT, IN = 4, 16, 32
Product = Callable[[Tensor, Tensor], Tensor]
"""A stack of weights as the module holds it, and inputs [4, rows, 32] → products [4, rows, 16]."""


class Toy(nn.Module):
    """Four matrices on four different inputs; what they give is folded into the hidden states."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, 32] → the same."""
        rows = hidden.flatten(0, 1)
        x = torch.stack([rows, rows.tanh(), rows.roll(1, -1) * 2, rows.abs()])
        y = self.products(x).sum(0)
        return hidden + torch.cat([y, y.sin()], -1).view_as(hidden)

    def products(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Linears(Toy):
    """The usual case."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(IN, OUT, bias=False) for _ in range(COUNT)])
        for part, weight in zip(self.parts, weights, strict=True):
            part.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def products(self, x: Tensor) -> Tensor:
        return torch.stack([part(x[i]) for i, part in enumerate(self.parts)])


class Stacked(Toy):
    """One parameter [4, out, in], or [4, in, out], and a product with it."""

    def __init__(self, stored: Tensor, product: Product) -> None:
        super().__init__()
        self.experts, self.product = nn.Parameter(stored.clone(), requires_grad=False), product

    def products(self, x: Tensor) -> Tensor:
        return self.product(self.experts, x)


def each(product: Product) -> Product:
    """A product of one weight, done with each."""
    return lambda stack, x: torch.stack([product(stack[e], x[e]) for e in range(COUNT)])


USES: dict[str, tuple[bool, Product]] = {
    "linear": (False, each(lambda w, x: functional.linear(x, w))),
    "named": (False, each(lambda w, x: functional.linear(input=x, weight=w))),
    "matmul": (False, each(lambda w, x: x @ w.t())),
    "mm": (False, each(lambda w, x: torch.mm(x, mat2=w.mT))),
    "addmm": (False, each(lambda w, x: torch.addmm(torch.zeros(OUT), x, w.t()))),
    "left": (False, each(lambda w, x: torch.matmul(w, x.t()).t())),
    "bmm": (False, lambda w, x: torch.bmm(x, w.transpose(1, 2))),
    "broadcast": (False, lambda w, x: (x[:, None] @ w.mT[:, None])[:, 0]),
    "pairs": (False, lambda w, x: torch.cat([torch.bmm(x[i : i + 2], w[i : i + 2].mT) for i in (0, 2)])),
    "stored [in, out]": (True, each(lambda w, x: x @ w)),
    "bmm, stored [in, out]": (True, lambda w, x: torch.bmm(x, w)),
}


class Fused(Toy):
    """One parameter [4 · out, in], cut into row ranges for its products; `whole`: one product with the first input."""

    def __init__(self, weights: Tensor, whole: bool) -> None:
        super().__init__()
        self.fused, self.whole = nn.Parameter(weights.flatten(0, 1).clone(), requires_grad=False), whole

    def products(self, x: Tensor) -> Tensor:
        if self.whole:
            return torch.stack(functional.linear(x[0], self.fused).chunk(COUNT, -1))
        return torch.stack([functional.linear(x[i], w) for i, w in enumerate(self.fused.chunk(COUNT))])


def weights(seed: int = 0) -> Tensor:
    """Random weights [4, out, in]."""
    return torch.randn(COUNT, OUT, IN, generator=torch.Generator().manual_seed(seed)) / IN**0.5


def inputs(batches: int = 4) -> list[Tensor]:
    """Hidden states [1, 48, 32] of which some channels are larger than others."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(IN, IN, generator=generator)
    return [torch.randn(1, 48, IN, generator=generator) @ mix for _ in range(batches)]


def opened(module: Toy, views: list[View], scheme: Scheme, *, one_input: bool = False) -> Block:
    """A block of these weights, its target known."""
    states = []
    for i, view in enumerate(views):
        value = view.get(module)
        states.append(WeightState(f"w{i}", view, scheme, value, value.dtype, 0 if one_input else i))
    batches = inputs()
    block = Block(module.eval(), states, batches, [Call((None,), {}, 0, None)] * len(batches))
    block.target = block.outputs()
    return block


def linears(scheme: Scheme) -> Block:
    """The block whose weights are nn.Linear modules."""
    return opened(Linears(weights()), [View(f"parts.{i}.weight") for i in range(COUNT)], scheme)


def stacked(use: str, scheme: Scheme) -> Block:
    """The block whose weights are slices of one parameter with three axes, used as USES says."""
    turned, product = USES[use]
    stored = weights().mT if turned else weights()
    return opened(
        Stacked(stored.contiguous(), product), [View("experts", e, None, turned) for e in range(COUNT)], scheme
    )


def fused(scheme: Scheme, *, whole: bool = False) -> Block:
    """The block whose weights are row ranges of one matrix; `whole`: one product, so all of them have one input."""
    views = [View("fused", rows=(i * OUT, (i + 1) * OUT)) for i in range(COUNT)]
    return opened(Fused(weights(), whole), views, scheme, one_input=whole)
