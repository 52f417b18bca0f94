"""Finding pairs in blocks made to mislead; tests/architectures has real types."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, silu, softmax

from llmq.discovery import bench as probe
from llmq.discovery import parameters
from llmq.discovery.calls import Call
from llmq.discovery.find_pairs import find_pairs
from llmq.discovery.pairs import Found, Pair
from tests.llmq.discovery.made import INNER, TOKENS, WIDTH, Made, Norm, fc, gated, mlp


def search(block: nn.Module, *rest: Any, shared: tuple[str, ...] = ()) -> tuple[dict[str, Pair], dict[str, str]]:
    with parameters.randomize(block):
        found = find_pairs(block, Call((None, *rest), {}, 0, None), torch.zeros(1, TOKENS, WIDTH), shared)
    assert isinstance(found, Found)
    return {p.source: p for p in found.pairs}, {r.source: r.reason for r in found.rejections}


def moved(block: nn.Module, pair: Pair, *, shift: bool = False) -> float:
    """How far a block's output goes when a pair is used, in float64 against the block's own parameters."""
    x = torch.randn(3, 11, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    block = block.double()
    before = block(x)
    values = torch.rand(pair.channels, generator=torch.Generator().manual_seed(6)) + 0.5
    (pair.apply_shift if shift else pair.apply)(block, values)
    return probe.difference(block(x), before)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_block(offset: float, bias: bool) -> None:
    block = mlp(norm=Norm(WIDTH, offset, bias), up=fc(INNER, WIDTH, bias), gate=fc(INNER, WIDTH, bias))
    pairs, reasons = search(block)
    norm, up = pairs.pop("norm.weight"), pairs.pop("up.weight")
    assert not pairs and reasons.keys() == {"gate.weight", "down.weight"}
    assert (norm.kind, norm.offset, norm.bias) == ("norm", offset, "norm.bias" if bias else None)
    assert [s.parameter for s in norm.consumers] == ["gate.weight", "up.weight"]
    assert (up.kind, up.bias, [s.parameter for s in up.consumers]) == (
        "linear",
        "up.bias" if bias else None,
        ["down.weight"],
    )
    assert (norm.shiftable, up.shiftable) == (bias, False)
    torch.manual_seed(0)
    assert (
        moved(mlp(norm=init(Norm(WIDTH, offset, bias)), up=fc(INNER, WIDTH, bias), gate=fc(INNER, WIDTH, bias)), norm)
        < 1e-6
    )


def init(norm: Norm) -> Norm:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def test_a_norm_whose_output_is_added_as_well() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return y + m.down(silu(m.gate(y)) * m.up(y))

    block = mlp()
    block.body = forward
    pairs, reasons = search(block)
    assert pairs.keys() == {"up.weight"}
    assert reasons["norm.weight"] == "its output is also used outside matrix products"


def test_one_channel_that_goes_elsewhere_is_enough() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return gated(m, x) + torch.nn.functional.pad(y[..., 3:4], (3, WIDTH - 4)) * 0.05

    block = mlp()
    block.body = forward
    assert "norm.weight" not in search(block)[0]


def test_a_square_between() -> None:
    block = Made(lambda m, x: x + m.down(relu(m.up(x)).square()), up=fc(INNER, WIDTH), down=fc(WIDTH, INNER))
    assert search(block) == ({}, search(block)[1])
    assert search(block)[1]["up.weight"] == "the input that it feeds scales with the square of a factor on it"


@pytest.mark.parametrize("act", [relu, gelu])
def test_an_activation_between(act: Callable[[Tensor], Tensor]) -> None:
    block = Made(
        lambda m, x: x + m.down(act(m.up(x))), up=fc(INNER, WIDTH, bias=True), down=fc(WIDTH, INNER, bias=True)
    )
    pairs, _ = search(block)
    assert pairs.keys() == ({"up.weight"} if act is relu else set())
    if act is relu:
        assert not pairs["up.weight"].shiftable
        assert moved(block, pairs["up.weight"]) < 1e-6


def test_a_bound_that_random_weights_do_not_reach() -> None:
    block = Made(lambda m, x: x + m.down(m.up(x).clamp(-30, 30)), up=fc(INNER, WIDTH), down=fc(WIDTH, INNER))
    pairs, reasons = search(block)
    assert not pairs and reasons["up.weight"] == "large values of its output are clamped before the next product"


def test_rarely_active_channels_are_seen() -> None:
    """One activation in nine: 32 samples leave some channels unseen."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.down(relu(m.gate(x) - 1.2) * m.up(x))

    block = Made(forward, gate=fc(200, WIDTH), up=fc(200, WIDTH), down=fc(WIDTH, 200))
    pairs, _ = search(block)
    assert pairs["up.weight"].channels == 200


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate", [0, 1])
def test_gate_and_up_in_one_weight(interleaved: bool, gate: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.both(x)
        halves = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
        return x + m.down(silu(halves[gate]) * halves[1 - gate])

    block = Made(forward, both=fc(2 * INNER, WIDTH, bias=True), down=fc(WIDTH, INNER))
    pair = search(block)[0]["both.weight"]
    rows = torch.arange(2 * INNER)
    expected = rows[1 - gate :: 2] if interleaved else rows.chunk(2)[1 - gate]
    assert pair.rows is not None and torch.equal(pair.rows, expected)
    assert moved(block, pair) < 1e-6


def attention(m: Any, x: Tensor, store: Any = None) -> Tensor:
    q, k, v = split(m.qkv(x))
    if store is not None:
        store["values"] = v
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    heads = [softmax((q[..., h, :] @ k.mT).masked_fill(mask, float("-inf")), -1) @ v for h in range(2)]
    return x + m.out(torch.cat(heads, -1))


def split(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two heads of queries around one of keys and values: q0 v k q1, of 3 each."""
    q0, v, k, q1 = y.split(3, -1)
    return torch.stack([q0, q1], -2), k, v


def test_values_are_found_wherever_they_lie() -> None:
    block = Made(attention, qkv=fc(12, WIDTH, bias=True), out=fc(WIDTH, 6, bias=True))
    pair = search(block)[0]["qkv.weight"]
    assert pair.rows is not None and pair.rows.tolist() == [3, 4, 5]
    assert pair.consumers[0].channel.tolist() == [0, 1, 2, 0, 1, 2]
    assert pair.shiftable
    assert moved(block, pair) < 1e-6
    assert moved(block, pair, shift=True) < 1e-6


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_values_left_for_later_blocks_stay(kind: Callable[[], Any]) -> None:
    store = kind()
    pairs, reasons = search(Made(attention, qkv=fc(12, WIDTH), out=fc(WIDTH, 6)), store)
    assert not pairs and reasons["qkv.weight"] == "its output is also used outside matrix products"
    assert not store


def test_a_weight_used_in_slices() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return x + linear(y, m.up.weight[:WIDTH]) + linear(silu(y), m.up.weight[WIDTH : 2 * WIDTH])

    block = Made(forward, norm=Norm(WIDTH), up=fc(2 * WIDTH, WIDTH))
    pairs, reasons = search(block)
    assert not pairs and reasons["norm.weight"] == "it feeds up.weight, which is not used as one matrix"


def test_what_other_blocks_share_is_left() -> None:
    pairs, reasons = search(mlp(), shared=("gate.weight",))
    assert pairs.keys() == {"up.weight"}
    assert reasons["norm.weight"] == "it feeds gate.weight, which is shared with another block"
    assert reasons["gate.weight"] == "it is shared with another block"


def test_matrices_stored_the_other_way_round() -> None:
    """A square matrix [in, out], whose axes only its use can tell."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.down(relu(torch.addmm(m.bias, m.norm(x).flatten(0, 1), m.up).view(x.shape)))

    up, bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
    block = Made(forward, norm=Norm(WIDTH), down=fc(WIDTH, WIDTH), up=up, bias=bias)
    pairs, _ = search(block)
    assert pairs["norm.weight"].consumers[0].axis == 0
    assert (pairs["up"].axis, pairs["up"].bias, pairs["up"].consumers[0].axis) == (1, "bias", 1)
    init(block.norm)  # type: ignore[arg-type]
    assert moved(block, pairs["norm.weight"]) < 1e-6
    assert moved(block, pairs["up"]) < 1e-6


def test_a_block_that_is_not_the_same_twice() -> None:
    block = mlp()
    block.body = lambda m, x: gated(m, x) + torch.randn_like(x)
    pairs, reasons = search(block)
    assert not pairs and set(reasons.values()) == {"two runs of the block on the same input differ"}


def test_experts_that_were_not_called() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x).flatten(0, 1)
        chosen = m.router(y).topk(1, -1).indices[:, 0]
        out = torch.zeros_like(y)
        for e in (0, 1):  # the third is never called in a run as short as this
            out[chosen == e] = m.experts[e](y[chosen == e])
        return x + out.view_as(x)

    block = Made(
        forward, norm=Norm(WIDTH), router=fc(3, WIDTH), experts=nn.ModuleList(fc(WIDTH, WIDTH) for _ in range(3))
    )
    pairs, reasons = search(block)
    assert not pairs and "experts" in reasons["norm.weight"]
