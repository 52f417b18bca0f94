"""Inputs seen at the products: the same as hooks on modules see, and replaced there by what is made of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.block.statistics import Hessian, Inputs, MeanSquare
from llmq.discovery import blocks as discover
from llmq.discovery.calls import record
from llmq.discovery.inputs import at_products, collect
from llmq.discovery.parameters import assign
from llmq.discovery.view import View
from llmq.errors import LlmqError
from tests.architectures import checks, tiny
from tests.llmq.block import toys

# Grouped heads; 1 + w; biases; fused rows; parallel attention; state spaces; fused heads; linear attention.
KINDS = ("llama", "gemma2", "opt", "phi3", "gpt_neox", "cohere2", "mamba", "bloom", "qwen3_next")


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_hooks(kind: str) -> None:
    """Every weight that discovery finds, on a block of every make, by hooks on its modules and by its products."""
    real = tiny.model(kind).float().eval()
    model = tiny.model(kind).float().eval()
    structure = discover.find(meta(kind))
    ids = torch.randint(10, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    blocks = list(model.get_submodule(structure.path).children())
    checks.fill(model, real)
    recording = record(model, blocks, [ids])
    hidden = recording.hidden[0]
    seen = 0
    for info, block, call in zip(structure.blocks, blocks, recording.calls[0], strict=True):
        by_hook: dict[str, list[Any]] = {}
        by_product: dict[View, list[Any]] = {}
        hooks = []
        for weight in info.weights:
            kinds = [kind(weight.width, torch.device("cpu")) for kind in (MeanSquare, Hessian, Inputs) * 2]
            by_hook[weight.name], by_product[weight.view] = kinds[:3], kinds[3:]

            def feed(_: nn.Module, args: tuple[Any, ...], statistics: list[Any] = kinds[:3]) -> None:
                for statistic in statistics:
                    statistic.update(args[0])

            hooks.append(model.get_submodule(weight.name).register_forward_pre_hook(feed))
        with torch.no_grad(), collect(block, by_product):
            hidden = call.run(block, hidden)
        for hook in hooks:
            hook.remove()
        for weight in info.weights:
            square, hessian, sample = by_hook[weight.name]
            square2, hessian2, sample2 = by_product[weight.view]
            assert square2.count == square.count > 0, weight.name
            assert torch.allclose(square2.mean, square.mean, rtol=1e-6, atol=0)
            largest = float(hessian.total.abs().max())
            assert torch.allclose(hessian2.total, hessian.total, rtol=1e-6, atol=1e-6 * largest)
            assert torch.equal(sample2.rows, sample.rows)
            seen += 1
    assert seen >= len(blocks)


def meta(kind: str) -> nn.Module:
    """The model without memory, as a plan has it."""
    model = tiny.model(kind).float().eval()
    model.set_experts_implementation("eager")
    for name, parameter in list(model.named_parameters()):
        assign(model, name, torch.empty(parameter.shape, device="meta"))
    return model


def inputs() -> Tensor:
    return torch.randn(toys.COUNT, 24, toys.IN, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("use", list(toys.USES))
def test_each_slice_meets_its_own_input(use: str) -> None:
    turned, product = toys.USES[use]
    stored = toys.weights().mT.contiguous() if turned else toys.weights()
    module, x = toys.Stacked(stored, product), inputs()
    views = [View("experts", e, None, turned) for e in range(toys.COUNT)]
    met: dict[str, list[Tensor]] = {view.name: [] for view in views}
    with at_products(module, {view: met[view.name].append for view in views}):
        result = module.products(x)
    assert torch.allclose(result, torch.einsum("eti,eoi->eto", x, toys.weights()), atol=1e-5)
    for e, view in enumerate(views):
        (found,) = met[view.name]
        assert torch.equal(found.reshape(-1, toys.IN), x[e])


@pytest.mark.parametrize("use", list(toys.USES))
@pytest.mark.parametrize("chosen", [(1,), (0, 1, 2, 3)])
def test_each_slice_takes_what_is_given_in_its_inputs_place(use: str, chosen: tuple[int, ...]) -> None:
    turned, product = toys.USES[use]
    stored = toys.weights().mT.contiguous() if turned else toys.weights()
    module, x = toys.Stacked(stored, product), inputs()
    kept = x.clone()

    def times(factor: float) -> Any:
        return lambda part: part * factor

    with at_products(module, {View("experts", e, None, turned): times(e + 2.0) for e in chosen}):
        result = module.products(x)
    factors = torch.tensor([e + 2.0 if e in chosen else 1.0 for e in range(toys.COUNT)])
    want = torch.einsum("eti,eoi->eto", x * factors[:, None, None], toys.weights())
    assert torch.allclose(result, want, atol=1e-4)
    assert torch.equal(x, kept)


def test_parameters_are_looked_up_when_the_product_is_made() -> None:
    module, x = toys.Linears(toys.weights()), inputs()
    seen: list[Tensor] = []
    with at_products(module, {View("parts.1.weight"): seen.append}):
        for _ in range(2):
            assign(module, "parts.1.weight", torch.ones(toys.OUT, toys.IN))
            module.products(x)
        module.parts[1].weight.data = torch.zeros(toys.OUT, toys.IN)
        module.products(x)
    assert len(seen) == 3 and all(torch.equal(part, x[1]) for part in seen)


def test_other_matrices_are_left_alone() -> None:
    """The product with another part, along the other axis, or with an unrelated matrix of the same numbers."""
    module, seen = toys.Stacked(toys.weights(), lambda w, x: x @ w[0].t()), []
    with at_products(module, {View("experts", 1): seen.append}):
        module.products(inputs())
        torch.nn.functional.linear(torch.ones(3, toys.OUT), module.experts[1].t())
        torch.nn.functional.linear(inputs(), module.experts[1].clone())
        torch.nn.functional.linear(torch.ones(3, toys.IN // 2), module.experts[1][:, : toys.IN // 2])
    assert not seen


def test_a_matrix_of_groups_is_one_weight() -> None:
    """A linear layer whose rows are split into groups, each with an input of its own: one weight, all the inputs."""
    weight = nn.Linear(8, 12, bias=False).requires_grad_(False)
    seen: list[Tensor] = []
    x = torch.randn(3, 5, 8)
    with at_products(weight, {View("weight"): seen.append}):
        torch.bmm(x, weight.weight.view(3, 4, 8).transpose(1, 2))
    assert len(seen) == 1 and torch.equal(seen[0], x)


def test_inputs_of_one_weight_and_batches_of_any_depth() -> None:
    for shape in itertools.chain([(8,)], [(2, 8), (1, 2, 8), (3, 1, 2, 8)]):
        linear = nn.Linear(8, 4)
        seen: list[Tensor] = []
        x = torch.randn(shape)
        with at_products(linear, {View("weight"): seen.append}):
            linear(x)
            x @ linear.weight.t()
        assert len(seen) == 2 and all(torch.equal(part, x) for part in seen)


def test_einsum_is_refused() -> None:
    module = toys.Stacked(toys.weights(), lambda w, x: torch.einsum("eoi,eti->eto", w, x))
    with at_products(module, {View("experts", 0): lambda _: None}), pytest.raises(LlmqError, match=r"experts.*einsum"):
        module.products(inputs())


def test_weights_that_share_an_input_must_agree() -> None:
    module = toys.Fused(toys.weights(), whole=True)
    one, other = View("fused", rows=(0, 16)), View("fused", rows=(16, 32))
    with at_products(module, {one: lambda x: x * 2, other: lambda x: x * 2}):
        assert torch.allclose(module.products(inputs())[0], 2 * inputs()[0] @ toys.weights()[0].t(), atol=1e-5)
    with (
        at_products(module, {one: lambda x: x * 2, other: lambda x: x}),
        pytest.raises(LlmqError, match=r"fused\[0:16\] and fused\[16:32\] share an input"),
    ):
        module.products(inputs())


def test_an_inner_context_sees_what_the_outer_one_made() -> None:
    linear, view, x = nn.Linear(8, 4, bias=False), View("weight"), torch.ones(3, 8)
    seen: list[Tensor] = []
    with at_products(linear, {view: lambda x: x + 1}):
        with at_products(linear, {view: lambda x: x * 5}), at_products(linear, {view: seen.append}):
            result = linear(x)
        again = linear(x)
    assert torch.equal(seen[0], (x + 1) * 5)
    assert torch.equal(result, linear((x + 1) * 5)) and torch.equal(again, linear(x + 1))
    with at_products(linear, {view: lambda x: x + 1}), at_products(nn.Linear(8, 4), {view: seen.append}):
        linear(x)
    assert len(seen) == 1
