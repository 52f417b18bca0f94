"""Choose the scale of a pair: candidates are judged on sampled rows, and the best one by the block's error.

AWQ, SmoothQuant and Outlier Suppression share this code and differ in their candidates; "no change" is always one of
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import Block, WeightState
from llmq.block.statistics import Inputs
from llmq.discovery.pairs import Consumer, Pair
from llmq.grids.activations import round_input, static_scale
from llmq.grids.base import QuantizedWeight, round_to_grid, rounding_of
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme

TINY = 1e-5
CLIPPED_BITS = 5
CLIPS = (0.85, 0.7, 0.55)


class Candidate(NamedTuple):
    """A scale and shift of a pair: x → (x − shift) / scale, float32 [channels] each; what: its parameters, in words."""

    what: str
    scale: Tensor
    shift: Tensor | None = None


class Side(NamedTuple):
    """Statistics for candidates, per channel of a pair, float32 [channels]: of the inputs and the weights they
    multiply.

    mean: E|x|; low, high: extremes of x; weight: the largest |w| that multiplies the channel; share: the mean of |w| /
    (largest |w| of its group) (AWQ's measure of a weight's size).
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor
    share: Tensor


def side(block: Block, pair: Pair) -> Side | None:
    """The statistics of a pair's consumers by channel; None if none of them is quantized."""
    states = quantized_consumers(block, pair)
    if not states:
        return None
    consumer, state = states[0]
    inputs: Inputs = state.statistics[Inputs]
    weights = torch.stack([_by_channel(w.value.float().abs().amax(0), s, pair.channels) for s, w in states]).amax(0)
    shares = torch.stack([_by_channel(_share(w), s, pair.channels) for s, w in states]).mean(0)
    return Side(
        _by_channel(inputs.mean_abs, consumer, pair.channels),
        -_by_channel(-inputs.low, consumer, pair.channels),
        _by_channel(inputs.high, consumer, pair.channels),
        weights,
        shares,
    )


def _by_channel(columns: Tensor, consumer: Consumer, channels: int) -> Tensor:
    """The largest value over the columns that each channel feeds: float32 [channels]."""
    found = torch.full((channels,), -torch.inf, device=columns.device)
    return found.scatter_reduce_(0, consumer.channel.to(columns.device), columns, "amax")


def _share(state: WeightState) -> Tensor:
    weight = state.value.float().abs()
    groups = weight.view(weight.shape[0], state.scheme.groups(weight.shape[1]), -1)
    return (groups / groups.amax(-1, keepdim=True).clamp_min(TINY)).flatten(1).mean(0)


def quantized_consumers(block: Block, pair: Pair) -> list[tuple[Consumer, WeightState]]:
    """A pair's consumers that are quantized, with their state."""
    return [
        (consumer, block.weights[consumer.parameter])
        for consumer in pair.consumers
        if consumer.parameter in block.weights
    ]


def normalized(scale: Tensor) -> Tensor:
    """A scale made finite and positive, divided by √(max · min) (AWQ's own normalization)."""
    scale = scale.nan_to_num(1.0, 1.0, 1.0).clamp_min(TINY)
    return scale / (scale.max() * scale.min()).sqrt()


def balance(block: Block, pair: Pair, candidates: Iterable[Candidate], method: str) -> bool:
    """Apply the candidate with the least consumer error on the sampled rows, if it lowers the block's error.

    Returns whether it is kept; the attempt is added to the block's log in both cases.
    """
    best, least = None, loss(block, pair, None)
    for candidate in candidates:
        error = loss(block, pair, candidate)
        if error < least:
            best, least = candidate, error
    where, before = pair.describe(), block.error()
    if best is None:
        why = "no scale tried was better than none"
        block.log.append(Attempt(method, where, before, None, Outcome.UNDONE, why=why))
        return False
    with block.trial() as trial:
        block.scale(pair, best.scale, best.shift)
        after = block.error()
        if after < before:
            trial.keep()
    outcome = Outcome.KEPT if trial.kept else Outcome.UNDONE
    block.log.append(Attempt(method, where, before, after, outcome, best.what))
    return trial.kept


def loss(block: Block, pair: Pair, candidate: Candidate | None) -> float:
    """The error of the rounded consumers' outputs on the sampled rows: Σ ‖Q(x)Q(W)ᵀ − xWᵀ‖²."""
    total = 0.0
    for consumer, state in quantized_consumers(block, pair):
        x, weight = state.statistics[Inputs].rows, state.value.float()
        exact = x @ weight.t()
        if candidate is not None:
            factor = candidate.scale[consumer.channel]
            if candidate.shift is not None:
                x = x - candidate.shift[consumer.channel]
                exact = x @ weight.t()
            x, weight = x / factor, weight * factor
        near = _near(weight, state.scheme, x.square().mean(0))
        total += float((rounded(x, state.scheme) @ near.t() - exact).square().sum())
    return total


def rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """Rows rounded as when the model runs; for static scales, the scale of their own largest magnitude is used."""
    if scheme.activations is None or scheme.activations.dynamic:
        return round_input(x, scheme, None)
    return round_input(x, scheme, static_scale(x.abs().amax(), scheme.grid))


def _near(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    """The weight rounded with the best of a few clips of each group: accurate enough to compare scales, and ten times
    as fast as a range search.
    """
    nearest = round_to_nearest(weight, scheme, torch.float32, "minmax")
    plain = nearest.dequantize(torch.float32)
    if scheme.bits > CLIPPED_BITS or scheme.rules.calibrated == "minmax" or not isinstance(nearest, QuantizedWeight):
        return plain
    groups = scheme.groups(weight.shape[1])

    def cost(value: Tensor) -> Tensor:
        return ((value - weight).square() * importance).view(weight.shape[0], groups, -1).sum(-1)

    best, least = plain, cost(plain)
    for factor in CLIPS:
        scale = rounding_of(scheme.rules).storable(nearest.scale * factor, torch.float32)
        codes = round_to_grid(weight, scale, nearest.zero, scheme)
        value = QuantizedWeight(codes, scale, nearest.zero, scheme).dequantize(torch.float32)
        error = cost(value)
        better = (error < least).repeat_interleave(weight.shape[1] // groups, 1)
        best, least = torch.where(better, value, best), torch.minimum(error, least)
    return best


def rounded_output_error(state: WeightState, rows: Tensor, clip: Tensor, scale_dtype: torch.dtype) -> float:
    """‖Q(x)Q(W)ᵀ − xWᵀ‖² on rows [n, in], with the static input scale for the largest magnitude `clip`."""
    weight = state.value.float()
    if state.rounded is None:
        state.rounded = round_to_nearest(weight, state.scheme, scale_dtype).dequantize(torch.float32)
    x = round_input(rows, state.scheme, static_scale(clip, state.scheme.grid))
    return float((x @ state.rounded.float().t() - rows @ weight.t()).square().sum())
