"""Pairs as arithmetic: a scale or a constant moves and the products stay, by numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmq.discovery.pairs import Consumer, Edit, Pair, Rejection, explain
from tests.llmq.methods.made import near, row


@given(st.integers(1, 9), st.sampled_from([0.0, 1.0]), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_edits_undo_each_other(channels: int, offset: float, random: Any) -> None:
    scale = torch.tensor([random.uniform(0.1, 10) for _ in range(channels)])
    consumer = Consumer("m", 1, torch.arange(2 * channels) % channels, None)
    pair = Pair("norm", "w", "b", 0, offset, None, channels, (consumer,), channels)
    values = {"w": torch.randn(channels), "b": torch.randn(channels), "m": torch.randn(3, 2 * channels)}
    there = {name: edit.of(values[name]) for name, edit in pair.edits(scale).items()}
    back = {name: edit.of(there[name]) for name, edit in pair.edits(1 / scale).items()}
    for name, value in values.items():
        assert torch.allclose(back[name], value, rtol=1e-4, atol=1e-5)
    x = torch.randn(channels)
    product = values["m"] @ (x * (offset + values["w"]) + values["b"]).repeat(2)
    assert torch.allclose(
        there["m"] @ (x * (offset + there["w"]) + there["b"]).repeat(2), product, rtol=1e-3, atol=1e-4
    )


def test_gamma_migration() -> None:
    """Outlier Suppression §4.1: γ moves out of a norm, so that its output is as even as what it normalizes."""
    consumer = Consumer("m", 1, torch.arange(3), None)
    norm = Pair("norm", "w", None, 0, 0.0, None, 3, (consumer,), 3)
    assert near(norm.gain(row(-3, 0.5, 2)), 3, 0.5, 2)
    plus_one = Pair("norm", "w", None, 0, 1.0, None, 3, (consumer,), 3)
    assert near(plus_one.gain(row(-3, 0.5, 2)), 2, 1.5, 3)
    matrix = Pair("linear", "a", None, 0, 0.0, torch.tensor([2, 0]), 3, (consumer,), 2)
    assert near(matrix.gain(torch.tensor([[3.0, 4], [0, 1], [5, 12]])), 13, 5)


def test_rows_of_a_source_and_nothing_else() -> None:
    pair = Pair("linear", "a", None, 0, 0.0, torch.tensor([3, 1]), 4, (), 2)
    edit = pair.edits(torch.tensor([2.0, 4.0]))["a"]
    assert edit == Edit(0, edit.factor)
    assert edit.factor.tolist() == [1, 0.25, 1, 0.5]


@pytest.mark.parametrize("scale", [[1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [1.0]])
def test_scales_that_cannot_be(scale: list[float]) -> None:
    pair = Pair("linear", "a", None, 0, 0.0, None, 2, (), 2)
    with pytest.raises(ValueError, match="a scale is 2 positive numbers"):
        pair.edits(torch.tensor(scale))
    with pytest.raises(ValueError, match="no biases that could absorb a shift"):
        pair.shifts(torch.ones(2), {})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_edit_is_along_its_axis() -> None:
    value, factor = drawn(3, 2), torch.tensor([2.0, 3.0, 5.0])
    assert np.allclose(Edit(0, factor).of(value), value.numpy() * np.array([[2], [3], [5]]))
    assert np.allclose(Edit(1, factor[:2]).of(value), value.numpy() * np.array([[2, 3]]))
    half = Edit(0, factor).of(value.to(torch.bfloat16))
    assert half.dtype == torch.float32


def test_a_norm_that_adds_one_keeps_what_it_multiplies_by() -> None:
    """w′ = (w + 1) · f − 1, so that 1 + w′ is (1 + w) · f."""
    weight, factor = drawn(4), torch.tensor([0.5, 1.0, 2.0, 4.0])
    moved = Edit(0, factor, 1.0).of(weight)
    assert torch.allclose(1 + moved, (1 + weight) * factor, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_gain_of_a_matrix_is_the_length_of_its_channel(axis: int) -> None:
    weight = drawn(4, 4)
    lengths = np.linalg.norm(weight.numpy().astype(np.float64), axis=1 - axis)
    pair = Pair("linear", "a", None, axis, 0.0, None, 4, (), 4)
    assert np.allclose(pair.gain(weight), lengths, rtol=1e-6)
    some = Pair("linear", "a", None, axis, 0.0, torch.tensor([2, 0]), 4, (), 2)
    assert np.allclose(some.gain(weight), lengths[[2, 0]], rtol=1e-6)


def test_the_gain_of_a_norm_is_what_it_multiplies_by() -> None:
    weight = torch.tensor([-3.0, 0.5, -0.5])
    assert Pair("norm", "w", None, 0, 0.0, None, 3, (), 3).gain(weight).tolist() == [3.0, 0.5, 0.5]
    assert Pair("norm", "w", None, 0, 1.0, None, 3, (), 3).gain(weight).tolist() == [2.0, 1.5, 0.5]


class Two(nn.Module):
    """A source [6, 3] of which four rows feed two consumers, one stored [in, out]; heads share channels."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.channel = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        for name, shape in {"a": (6, 3), "ab": (6,), "m": (5, 8), "mb": (5,), "t": (8, 2), "tb": (2,)}.items():
            self.register_parameter(name, nn.Parameter(drawn(*shape, seed=len(name) + shape[0]).to(dtype)))

    def pair(self) -> Pair:
        consumers = (Consumer("m", 1, self.channel, "mb"), Consumer("t", 0, self.channel, "tb"))
        return Pair("linear", "a", "ab", 0, 0.0, torch.tensor([5, 1, 2, 0]), 6, consumers, 4, shiftable=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x @ self.a.T + self.ab
        z = y[:, [5, 1, 2, 0]][:, self.channel]
        return z @ self.m.T + self.mb, z @ self.t + self.tb, y[:, [3, 4]]


@pytest.mark.parametrize("shift", [False, True])
def test_what_is_moved_is_not_seen_behind_the_consumers(shift: bool) -> None:
    block, x = Two(), drawn(7, 3, seed=9).double()
    before = [value.detach() for value in block(x)]
    source = block.ab.detach().clone()
    values = torch.tensor([0.5, 2.0, 3.0, 0.25])
    (block.pair().apply_shift if shift else block.pair().apply)(block, values)
    for was, now in zip(before, block(x), strict=True):
        assert torch.allclose(now, was, rtol=1e-5, atol=1e-5)
    expected = source.clone()
    rows = [5, 1, 2, 0]
    expected[rows] = source[rows] - values if shift else source[rows] / values
    assert torch.allclose(block.ab.detach(), expected, atol=1e-6)


def test_a_shift_is_given_back_as_the_product_with_it() -> None:
    block, shift = Two(), torch.tensor([1.0, -2.0, 0.0, 4.0])
    made = block.pair().shifts(shift, dict(block.named_parameters()))
    z = shift.double().numpy()[block.channel.numpy()]
    assert np.allclose(made["mb"].detach(), block.m.detach().numpy() @ z, rtol=1e-5)
    assert np.allclose(made["tb"].detach(), z @ block.t.detach().numpy(), rtol=1e-5)
    assert made["ab"].tolist() == [-4.0, 2.0, 0.0, 0.0, 0.0, -1.0]


def test_a_block_in_half_precision_keeps_its_dtype() -> None:
    block = Two(torch.bfloat16)
    wanted = (block.a.detach().float()[1] / 2).to(torch.bfloat16)
    block.pair().apply(block, torch.full((4,), 2.0))
    assert all(p.dtype == torch.bfloat16 for p in block.parameters()) and torch.equal(block.a.detach()[1], wanted)


def test_pairs_in_words() -> None:
    some = Two().pair()
    assert some.describe() == "a → m, t"
    norm = Pair("norm", "w", None, 0, 0.0, None, 4, (Consumer("m", 1, torch.arange(4), None),), 4)
    assert explain([some, norm], [Rejection("x", "it is shared")]) == [
        ("a [4 of 6 rows]", "m, t", "linear, shift"),
        ("w", "m", "norm"),
        ("x", "it is shared", ""),
    ]
