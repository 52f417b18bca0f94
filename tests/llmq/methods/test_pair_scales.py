"""Choosing scales: the loss of a candidate against dense float64 with the rounding done anew, and who wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import Block, WeightState
from llmq.block.statistics import Inputs
from llmq.discovery.pairs import NORM, Pair
from llmq.grids.scheme import Activations, Scheme
from llmq.methods._pair_scales import CLIPS, Candidate, balance, loss, normalized, side
from llmq.recipe.recipe import Recipe
from tests.llmq.blocks import apart, open_block, write

SCHEMES = [
    Scheme(4, 16),
    Scheme(3, 32, symmetric=False),
    Scheme(8, 16),
    Scheme(8, None, activations=Activations()),
    Scheme(8, None, activations=Activations(dynamic=False)),
    Scheme(8, None, grid="fp8", activations=Activations()),
]


def opened(scheme: Scheme, folder: Path, kind: str = "llama") -> Block:
    block = open_block(write(kind, folder / "model"), Recipe(methods=("smoothquant",), scheme=scheme))
    block.observe((Inputs,))
    block.weigh()
    return block


def drawn(channels: int) -> Tensor:
    return torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(3)) * 0.7)


def float8(value: Tensor) -> Tensor:
    """The nearest of all float8_e4m3fn numbers, found among all of them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    place = (value.contiguous()[..., None] - numbers).abs().argmin(-1)
    return numbers[place]


def rounded_weight(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    """Each group on min-max or a clipped grid, by which of them loses least; float64."""
    if scheme.grid == "fp8":
        scale = weight.abs().amax(1, keepdim=True) / 448
        return float8(weight / scale) * scale
    size = scheme.group_size or weight.shape[1]
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    groups, cost = weight.unflatten(1, (-1, size)), importance.unflatten(0, (-1, size))
    if scheme.symmetric:
        # The largest weight lies right between two codes: which of them it gets, only float32 can tell.
        top, zero = groups.float().abs().amax(-1, keepdim=True) * (2 / (2**scheme.bits - 1)), torch.zeros(())
    else:
        bottom = groups.amin(-1, keepdim=True).clamp(max=0)
        top = (groups.amax(-1, keepdim=True).clamp(min=0) - bottom) / (2**scheme.bits - 1)
        zero = (low - bottom / top).round().clamp(low, high)
    tried = []
    for factor in (1.0, *(CLIPS if scheme.bits <= 5 else ())):
        scale = (top * factor).float()
        codes = ((groups.float() / scale).round() + zero).clamp(low, high)
        tried.append((codes - zero).double() * scale)
    found = torch.stack(tried)
    best = ((found - groups).square() * cost).sum(-1).argmin(0)
    return found.gather(0, best[None, ..., None].expand(1, *groups.shape))[0].flatten(1)


def rounded_input(x: Tensor, scheme: Scheme) -> Tensor:
    if scheme.activations is None:
        return x
    top = x.abs().amax(-1, keepdim=True) if scheme.activations.dynamic else x.abs().max()
    if scheme.grid == "fp8":
        return float8(x / top * 448) * top / 448
    scale = top.float() / 127.5
    return (x.float() / scale).round().clamp(-128, 127).double() * scale


def reference(states: list[tuple[WeightState, Tensor]], scale: Tensor | None, shift: Tensor | None) -> float:
    """Σ ‖Q(x')Q(W')ᵀ − x'W'ᵀ‖², x' = (x − shift)/scale, W' = W·scale; in float64."""
    total = 0.0
    for state, channel in states:
        x, weight = state.statistics[Inputs].rows.double(), state.value.double()
        if shift is not None:
            x = x - shift.double()[channel]
        if scale is not None:
            x, weight = x / scale.double()[channel], weight * scale.double()[channel]
        near = rounded_weight(weight, state.scheme, x.square().mean(0))
        total += float((rounded_input(x, state.scheme) @ near.t() - x @ weight.t()).square().sum())
    return total


def consumers(block: Block, pair: Pair) -> list[tuple[WeightState, Tensor]]:
    return [(block.weights[s.parameter], s.channel) for s in pair.consumers if s.parameter in block.weights]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_loss_of_a_candidate(scheme: Scheme, tmp_path: Path) -> None:
    block = opened(scheme, tmp_path)
    for pair in block.pairs:
        scale = drawn(pair.channels)
        for given in (None, scale):
            found = loss(block, pair, None if given is None else Candidate("", given))
            assert found == pytest.approx(reference(consumers(block, pair), given, None), rel=0.005)


def test_the_loss_of_a_shift(tmp_path: Path) -> None:
    block = opened(SCHEMES[3], tmp_path, "opt")
    pair = next(p for p in block.pairs if p.shiftable)
    scale, shift = drawn(pair.channels), torch.linspace(-1, 1, pair.channels)
    found = loss(block, pair, Candidate("", scale, shift))
    assert found == pytest.approx(reference(consumers(block, pair), scale, shift), rel=0.01)
    assert found != pytest.approx(loss(block, pair, Candidate("", scale)), rel=0.05)


def test_a_side_is_what_channels_carry(tmp_path: Path) -> None:
    block = opened(Scheme(4, 16), tmp_path)
    for pair in block.pairs:
        found = side(block, pair)
        assert found is not None
        fed: list[Tensor] = []
        module = block.module.get_submodule(pair.consumers[0].parameter.rpartition(".")[0])
        hook = module.register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0].flatten(0, 1)))
        block.outputs()
        hook.remove()
        x = torch.cat(fed).double()
        for channel in (0, 1, pair.channels - 1):
            columns = [c for c in range(x.shape[1]) if int(pair.consumers[0].channel[c]) == channel]
            part = x[:, columns]
            assert float(found.mean[channel]) == pytest.approx(float(part.abs().mean(0).max()), rel=1e-5)
            assert float(found.low[channel]) == pytest.approx(float(part.min()), rel=1e-5)
            assert float(found.high[channel]) == pytest.approx(float(part.max()), rel=1e-5)
            weights = [state.value[:, columns].abs() for state, _ in consumers(block, pair)]
            assert float(found.weight[channel]) == max(float(w.max()) for w in weights)
            shares = []
            for state, _ in consumers(block, pair):
                group = state.value.abs().unflatten(1, (-1, 16))
                shares.append((group / group.amax(-1, keepdim=True)).flatten(1).mean(0)[columns].max())
            assert float(found.share[channel]) == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)


def outlying(folder: Path, scheme: Scheme) -> tuple[Block, Pair]:
    """A block of which a norm makes one channel in sixteen 40 times as large."""
    block = open_block(write("llama", folder / "model"), Recipe(methods=("smoothquant",), scheme=scheme))
    pair = next(p for p in block.pairs if p.kind == NORM)
    gains = torch.ones(pair.channels)
    gains[5::16] = 40
    block.set(pair.source, block.get(pair.source).abs() * gains)
    block.changed.clear()
    block.target = block.outputs()
    block.observe((Inputs,))
    block.weigh()
    return block, pair


def test_the_best_candidate_is_taken(tmp_path: Path) -> None:
    block, pair = outlying(tmp_path, SCHEMES[3])
    inverse = torch.ones(pair.channels)
    inverse[5::16] = 6
    tried = [Candidate("bad", 1 / inverse), Candidate("good", inverse), Candidate("none", torch.ones(pair.channels))]
    losses = {c.what: loss(block, pair, c) for c in tried}
    assert min(losses, key=losses.__getitem__) == "good" and losses["good"] < loss(block, pair, None)
    source, before = block.get(pair.source).clone(), block.error()
    assert balance(block, pair, iter(tried), "test")
    (line,) = block.log
    assert line == Attempt("test", pair.describe(), before, block.error(), Outcome.KEPT, "good")
    assert line.after is not None and line.after < before
    assert torch.allclose(block.get(pair.source) * inverse, source, rtol=1e-6)
    assert block.changed == {pair.source}
    block._error = None
    assert block.error() == pytest.approx(line.after, rel=1e-6)


def test_where_nothing_is_better_nothing_moves(tmp_path: Path) -> None:
    block, pair = outlying(tmp_path, SCHEMES[3])
    worse = torch.ones(pair.channels)
    worse[5::16] = 1 / 40
    assert not balance(block, pair, [Candidate("worse", worse)], "test")
    assert not balance(block, pair, [], "test")
    assert [(line.outcome, line.after) for line in block.log] == [(Outcome.UNDONE, None)] * 2
    assert all("no scale" in line.why for line in block.log)
    assert not block.changed and apart(block.outputs(), block.target) == 0


def test_better_on_the_rows_and_worse_for_the_block_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, pair = outlying(tmp_path, SCHEMES[3])
    worse = torch.ones(pair.channels)
    worse[5::16] = 1 / 40
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    monkeypatch.setattr("llmq.methods._pair_scales.loss", lambda block, pair, candidate: float(candidate is None))
    assert not balance(block, pair, [Candidate("worse", worse)], "test")
    (line,) = block.log
    assert line.outcome is Outcome.UNDONE and line.choice == "worse"
    assert line.after is not None and line.before is not None and line.after > line.before
    assert not block.changed
    assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())


def test_a_pair_of_kept_consumers_has_no_side(tmp_path: Path) -> None:
    recipe = Recipe(methods=("smoothquant",), scheme=Scheme(8, None), keep=("o_proj",))
    block = open_block(write("llama", tmp_path / "model"), recipe)
    block.observe((Inputs,))
    pair = next(p for p in block.pairs if p.consumers[0].parameter.endswith("o_proj.weight"))
    assert side(block, pair) is None


def test_normalized() -> None:
    assert torch.allclose(normalized(torch.tensor([1.0, 4.0, 16.0])), torch.tensor([0.25, 1.0, 4.0]))
    odd = normalized(torch.tensor([0.0, float("nan"), float("inf"), 1.0]))
    assert bool((odd > 0).all() and odd.isfinite().all())
