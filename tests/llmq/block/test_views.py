"""Weights that are slices of one parameter go through a block as those of nn.Linear modules do: same codes, same error,
undone without a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.block.block import Block
from llmq.block.statistics import Hessian, Inputs
from llmq.discovery.view import View
from llmq.errors import LlmqError
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Activations, Scheme
from llmq.methods import Pipeline
from llmq.methods.gptq import GPTQ
from llmq.methods.rtn import RTN
from llmq.methods.signround import SignRound
from llmq.report.rows import weight_row
from llmq.streaming import steps
from tests.llmq.block import toys

W4 = Scheme(4, 16)
W8A8 = Scheme(8, None, activations=Activations())
STATIC = Scheme(8, None, activations=Activations(dynamic=False))
USES = [*toys.USES, "fused"]


def made(use: str, scheme: Scheme) -> Block:
    return toys.fused(scheme) if use == "fused" else toys.stacked(use, scheme)


def results(block: Block) -> list[tuple[Tensor, Tensor]]:
    found: list[Any] = [state.quantized for state in block.weights.values()]
    return [(q.codes, q.scale) for q in found]


def same(one: Block, other: Block) -> bool:
    return all(
        torch.equal(a, b)
        for left, right in zip(results(one), results(other), strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("scheme", [W4, W8A8, STATIC], ids=["w4", "w8a8", "static"])
def test_gptq_gives_the_codes_of_linear_layers(use: str, scheme: Scheme) -> None:
    plain, block = toys.linears(scheme), made(use, scheme)
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    values = [state.value for state in block.weights.values()]
    for each in (plain, block):
        steps.quantize(each, Pipeline((), GPTQ(), ()))
    assert same(block, plain)
    assert block.error() == pytest.approx(plain.error(), rel=1e-5) and block.error() > 1e-3
    (name,) = before
    for state, other, value in zip(block.weights.values(), plain.weights.values(), values, strict=True):
        assert torch.equal(state.view.get(block.module), state.result()) and torch.equal(state.value, state.result())
        assert weight_row(state, 0, 0).error == weight_row(other, 0, 0).error > 0
        if scheme is STATIC:
            assert torch.equal(state.input_scale, other.input_scale)  # type: ignore[arg-type]
        # What was to be rounded is unchanged: the rounded weights are in memory of their own.
        assert torch.equal(value, state.view.of(before[name]))


@pytest.mark.parametrize("scheme", [Scheme(3, 16), W8A8], ids=["w3", "w8a8"])
@pytest.mark.parametrize("use", ["linear", "bmm", "stored [in, out]", "fused"])
def test_signround_learns_slices(use: str, scheme: Scheme) -> None:
    plain, block = toys.linears(scheme), made(use, scheme)
    for each in (plain, block):
        steps.round_weights(each, RTN())
        for name, state in each.weights.items():  # so that there is something to learn with 8 bits too
            each.set_quantized(name, round_to_nearest(state.value * 1.1, scheme, each.scale_dtype))
    start, before = results(block), block.error()
    memory = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    for each in (plain, block):
        SignRound(iterations=40).refine(each)
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(start, results(block), strict=True))
    assert block.error() < before
    # Gradients of slices are sums in another order: a sign near zero may differ.
    assert block.error() == pytest.approx(plain.error(), rel=0.05)
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, memory[name]) and not parameter.requires_grad


def contents(block: Block) -> dict[str, Any]:
    """Everything of a block that something tried on it can change."""
    found: dict[str, Any] = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    for name, each in block.weights.items():
        found[f"value {name}"] = each.value.clone()
        found[f"quantized {name}"] = each.quantized
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(a, other[name]) if isinstance(a, Tensor) else a is other[name] for name, a in one.items())


@pytest.mark.parametrize("use", ["linear", "stored [in, out]", "fused"])
def test_a_trial_of_two_slices_leaves_no_trace(use: str) -> None:
    block = made(use, W4)
    first, second, *_ = block.weights
    (parameter,) = (name for name, _ in block.module.named_parameters())
    steps.round_weights(block, RTN())
    before, error = contents(block), block.error()
    with block.trial() as outer:
        block.set(first, block.get(first) * 2)
        with block.trial():
            block.set(second, block.get(second) * 3)
            block.set(first, block.get(first) * 5)
            block.set(parameter, block.get(parameter) + 1)
            block.set(second, block.get(second) - 7)
            assert block.error() > error
        assert torch.equal(block.weights[first].view.get(block.module), before[f"value {first}"] * 2)
        assert torch.equal(block.get(second), before[f"value {second}"])
    assert not outer.kept and equal(contents(block), before)
    assert block.error() == error
    with block.trial() as trial:
        block.set(first, block.get(first) * 2)
        trial.keep()
    assert torch.equal(block.get(first), before[f"value {first}"] * 2)
    assert not equal(contents(block), before)


def test_a_kept_trial_within_one_that_is_not_is_undone_too() -> None:
    block = made("linear", W4)
    first = next(iter(block.weights))
    before = contents(block)
    with block.trial():
        with block.trial() as inner:
            block.set(first, block.get(first) * 2)
            inner.keep()
        assert not equal(contents(block), before)
    assert equal(contents(block), before)


def test_a_parameter_is_known_as_exactly_as_its_weights() -> None:
    module = toys.Fused(toys.weights().to(torch.bfloat16), whole=False)
    views = [View("fused", rows=(i * toys.OUT, (i + 1) * toys.OUT)) for i in range(toys.COUNT)]
    block = Block(module, [replace_value(module, view) for view in views], [], [])
    exact = torch.randn(toys.COUNT * toys.OUT, toys.IN)
    block.set("fused", exact)
    assert torch.equal(block.get("fused"), exact)
    assert torch.equal(module.fused, exact.to(torch.bfloat16))
    assert torch.equal(block.get(views[1].name), exact[toys.OUT : 2 * toys.OUT])
    block.set(views[1].name, torch.full((toys.OUT, toys.IN), 1.001))
    assert torch.equal(block.get("fused")[toys.OUT : 2 * toys.OUT], torch.full((toys.OUT, toys.IN), 1.001))
    assert torch.equal(block.get("fused")[: toys.OUT], exact[: toys.OUT])
    assert not block.changed


def replace_value(module: toys.Fused, view: View) -> Any:
    template = next(iter(toys.linears(W4).weights.values()))
    return replace(template, name=view.name, view=view, value=view.get(module), dtype=torch.bfloat16)


def test_one_product_with_a_fused_parameter_feeds_all_its_weights() -> None:
    block = toys.fused(STATIC, whole=True)
    for each in block.weights.values():
        each.input_id = int(each.name.removeprefix("w"))  # a statistic each, though they share an input
    block.observe((Hessian, Inputs))
    x = torch.cat([h.flatten(0, 1) for h in block.inputs])
    for each in block.weights.values():
        assert torch.allclose(each.statistics[Hessian].total, x.t() @ x, rtol=1e-5, atol=1e-2)
        assert each.statistics[Inputs].count == len(x)
    steps.round_weights(block, RTN())
    assert block.error() > 0
    next(iter(block.weights.values())).input_scale = torch.tensor([9.0])
    block._error = None
    with pytest.raises(LlmqError, match=r"fused\[0:16\] and fused\[16:32\] share an input"):
        block.error()
