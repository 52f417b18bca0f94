"""Parameters put in place for a while: zeros, random ones, others; afterwards the very tensors that were there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery import parameters
from tests.llmq.discovery.made import mlp


def test_randomize_gives_back_what_was_there() -> None:
    block = mlp().to(torch.bfloat16)
    block.register_buffer("table", torch.ones(3, dtype=torch.bfloat16))
    before = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    with pytest.raises(RuntimeError), parameters.randomize(block):
        assert all(p.dtype == torch.float32 for p in block.parameters())
        assert block.get_buffer("table").dtype == torch.float32
        raise RuntimeError
    after = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    assert all(after[name] is value for name, value in before.items())


class Tied(nn.Module):
    """Two modules that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.ones(3))


def held(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def test_zeros_are_for_a_while_and_keep_ties() -> None:
    model = Tied()
    before = held(model)
    with parameters.zeros(model, ["a.weight"]):
        assert model.a.weight is model.b.weight and not model.a.weight.any()
        assert model.c.weight is before["c.weight"]
    with pytest.raises(KeyError), parameters.zeros(model):
        assert not any(bool(p.any()) for p in model.parameters())
        raise KeyError
    assert all(now is before[name] for name, now in held(model).items())


def test_zeros_in_place_of_nothing_have_its_dtype() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 2, dtype=torch.bfloat16)
    with parameters.zeros(model):
        assert model.weight.device.type == "cpu" and model.weight.dtype == torch.bfloat16
        assert model(torch.ones(1, 4, dtype=torch.bfloat16)).tolist() == [[0.0, 0.0]]
    assert model.weight.device.type == "meta"


def values(module: nn.Module, seed: int) -> dict[str, Tensor]:
    with parameters.randomize(module, seed):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_random_values_are_the_seed_s() -> None:
    model = Tied()
    first, same, other = values(model, 1), values(model, 1), values(model, 2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


class Kinds(nn.Module):
    """A parameter of each kind that there is in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(400, 300)
        self.norm = nn.LayerNorm(300)
        self.scale = nn.Parameter(torch.zeros(1))
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def test_random_values_are_of_the_size_of_their_kind() -> None:
    """A matrix keeps the variance of what passes through; a norm's weight is near 1, biases are small."""
    found = values(Kinds(), 0)
    assert float(found["up.weight"].double().var()) == pytest.approx(1 / 400, rel=0.02)
    assert float(found["up.weight"].abs().max()) <= (3 / 400) ** 0.5
    for name, low, high in (("norm.weight", 0.5, 1.5), ("up.bias", -0.2, 0.2), ("norm.bias", -0.2, 0.2)):
        assert low <= float(found[name].min()) < float(found[name].max()) <= high, name
        assert float(found[name].double().mean()) == pytest.approx((low + high) / 2, abs=0.1)
    assert 0.5 <= float(found["scale"]) <= 1.5
    assert not found["codes"].any() and found["codes"].dtype == torch.int8


def test_a_buffer_on_meta_is_left_there() -> None:
    model = Tied()
    model.table = model.table.to("meta")
    with parameters.randomize(model):
        assert model.table.device.type == "meta"


def test_swapped_values_are_those_given() -> None:
    model, other = Tied(), torch.full((6, 6), 2.0)
    before = held(model)
    with parameters.swapped(model, {"b.weight": other}):
        assert torch.equal(model.a.weight, other) and model.a.weight is model.b.weight
        assert not model.a.weight.requires_grad
    assert all(now is before[name] for name, now in held(model).items())


def test_assign_reaches_every_owner_and_buffers() -> None:
    model = Tied()
    parameters.assign(model, "a.weight", torch.zeros(6, 6))
    assert model.b.weight is model.a.weight and not model.b.weight.any()
    parameters.assign(model, "table", torch.zeros(2))
    assert model.table.shape == (2,) and "table" in dict(model.named_buffers())
    with pytest.raises(AttributeError):
        parameters.assign(model, "nothing", torch.zeros(1))


def test_empty_sends_to_meta_with_ties_once() -> None:
    model = Tied()
    parameters.empty(model, "a.weight")
    gone = model.a.weight
    assert gone.device.type == "meta" and gone.shape == (6, 6) and model.b.weight is gone
    parameters.empty(model, "b.weight")
    assert model.a.weight is gone


def test_shared_zeros_take_the_memory_of_one_number_and_keep_ties() -> None:
    model = Tied()
    before = held(model)
    with parameters.shared_zeros(model):
        assert model.a.weight is model.b.weight and all(not p.any() for p in model.parameters())
        assert {p.untyped_storage().nbytes() for p in model.parameters()} == {4}
        assert [p.shape for p in held(model).values()] == [p.shape for p in before.values()]
    assert all(held(model)[name] is value for name, value in before.items())
