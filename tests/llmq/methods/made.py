"""What the tests of methods share: the facts of a pair's channels, and a look at what is made of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmq.block.block import Block, WeightState
from llmq.block.statistics import Hessian, Inputs, MeanSquare
from llmq.discovery.calls import Call
from llmq.discovery.pairs import Consumer, Pair
from llmq.discovery.view import View
from llmq.grids.scheme import Scheme
from llmq.methods._pair_scales import Candidate, Side
from tests.llmq.discovery.made import INNER, WIDTH, Norm, fc, mlp


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def facts(**changed: Tensor) -> Side:
    """Three channels: the middle one has large inputs, the last lies to one side."""
    usual = {
        "mean": row(1, 16, 4),
        "low": row(-2, -64, 0),
        "high": row(1, 32, 16),
        "weight": row(4, 1, 2),
        "share": row(0.25, 1, 0.5),
    }
    return Side(**usual | changed)


def by_name(candidates: Iterable[Candidate]) -> dict[str, Candidate]:
    return {candidate.what: candidate for candidate in candidates}


def near(value: Tensor, *expected: float) -> bool:
    return torch.allclose(value, row(*expected), rtol=1e-5)


def block_of(scheme: Scheme, *, bias: bool = False, kept: tuple[str, ...] = ()) -> Block:
    """A norm, two matrices behind it and one behind those; the norm makes a channel in six 30 times as large,
    which the matrices behind it take back.

    Its pairs are norm → gate, up and up → down; its statistics are taken. bias: everywhere, so that the norm can be
    shifted; kept: the matrices that are not quantized.
    """
    draw = torch.Generator().manual_seed(0)
    module = mlp(
        norm=Norm(WIDTH, bias=bias),
        gate=fc(INNER, WIDTH, bias),
        up=fc(INNER, WIDTH, bias),
        down=fc(WIDTH, INNER, bias),
    ).eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * (1.0 if parameter.dim() == 1 else 0.3))
        if name == "norm.weight":
            parameter.abs_().add_(0.5)[1::6] *= 30
        if name == "norm.bias":
            parameter[2::6] += 40
        if name in ("gate.weight", "up.weight"):
            parameter[:, 1::6] /= 30
    everything, inner = torch.arange(WIDTH), torch.arange(INNER)

    def named(name: str) -> str | None:
        return name if bias else None

    fed = tuple(Consumer(f"{name}.weight", 1, everything, named(f"{name}.bias")) for name in ("gate", "up"))
    pairs = [
        Pair("norm", "norm.weight", named("norm.bias"), 0, 0.0, None, WIDTH, fed, WIDTH, shiftable=bias),
        Pair(
            "linear",
            "up.weight",
            named("up.bias"),
            0,
            0.0,
            None,
            INNER,
            (Consumer("down.weight", 1, inner, named("down.bias")),),
            INNER,
        ),
    ]
    states = []
    for at, name in enumerate(("gate.weight", "up.weight", "down.weight")):
        if name not in kept:
            value = module.get_parameter(name).data.clone()
            states.append(WeightState(name, View(name), scheme, value, value.dtype, at // 2))
    inputs = [torch.randn(1, 24, WIDTH, generator=draw) for _ in range(4)]
    block = Block(module, states, inputs, [Call((None,), {}, 0, None)] * len(inputs), pairs=pairs)
    block.target = block.outputs()
    block.observe((Inputs, Hessian, MeanSquare))
    block.weigh()
    return block


def check_function_is_kept(block: Block) -> None:
    """The block gives, unrounded, what it gave before."""
    apart = [float((now - then).norm() / then.norm()) for now, then in zip(block.outputs(), block.target, strict=True)]
    assert max(apart) < 1e-4
