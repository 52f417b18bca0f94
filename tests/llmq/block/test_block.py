"""A block while it is quantized: moving scales leaves its function alone, a trial leaves no trace, its error is what it
says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.block.block import Block, relative_error
from llmq.block.statistics import Inputs
from llmq.discovery.pairs import LINEAR, NORM, Pair
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.rtn import RTN
from llmq.recipe.recipe import Recipe
from llmq.streaming import steps
from tests.llmq.blocks import apart, open_block, write

W4 = Recipe(methods=("awq",), scheme=Scheme(4, 16))
W8A8 = Recipe(methods=("smoothquant",), scheme=Scheme(8, None, activations=Activations()))
STATIC = replace(W8A8, scheme=Scheme(8, None, activations=Activations(dynamic=False)))
# llama: grouped heads; gemma2: 1 + w; opt, gpt_neox: biases, shifts; phi3: rows of fused weights; cohere2: parallel.
KINDS = ("llama", "gemma2", "opt", "gpt_neox", "phi3", "cohere2")


def drawn(channels: int, seed: int = 3) -> Tensor:
    """Positive factors around 1, none of them a power of two."""
    return torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * 0.7)


def shift_of(pair: Pair, seed: int = 4) -> Tensor | None:
    if not pair.shiftable:
        return None
    return torch.randn(pair.channels, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_leaves_the_function_alone(kind: str, tmp_path: Path) -> None:
    block = open_block(write(kind, tmp_path / "model"), W4)
    assert block.pairs
    shifted = [pair for pair in block.pairs if pair.shiftable]
    assert bool(shifted) == (kind in ("opt", "gpt_neox"))
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    for pair in block.pairs:
        block.scale(pair, drawn(pair.channels), shift_of(pair))
        assert apart(block.outputs(), block.target) < 1e-4, pair.describe()
        for consumer in pair.consumers:
            state = block.weights[consumer.parameter]
            assert not torch.allclose(state.value, before[consumer.parameter], rtol=0.1)
            assert state.value.dtype == torch.float32
            assert torch.equal(state.view.get(block.module), state.value)
    sources = {name for pair in block.pairs for name in (pair.source, pair.bias) if name}
    biases = {consumer.bias for pair in shifted for consumer in pair.consumers if consumer.bias}
    assert block.changed == (sources | biases) - block.weights.keys()


def products(block: Block, pair: Pair) -> list[Tensor]:
    """What each column of the consumers comes to together with its channel of the source, in float64."""
    source = block.get(pair.source).double()
    rows = torch.arange(pair.entries) if pair.rows is None else pair.rows
    found = []
    for consumer in pair.consumers:
        weight, channel = block.get(consumer.parameter).double(), rows[consumer.channel]
        if pair.kind == NORM:
            found.append(weight * (source[channel] + pair.offset))
        else:
            found.append(weight.t()[:, :, None] * source[channel][:, None, :])
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_what_a_norm_loses_in_storage_the_consumers_make_up_for(kind: str, tmp_path: Path) -> None:
    """In bfloat16 a norm's weight is rounded when it is divided: to 0.4 %, and yet every product is what it was."""
    block = open_block(write(kind, tmp_path / "model", torch.bfloat16), W4)
    lost = 0.0
    for pair in block.pairs:
        before, source, scale = products(block, pair), block.get(pair.source), drawn(pair.channels)
        block.scale(pair, scale)
        for now, then in zip(products(block, pair), before, strict=True):
            assert float(((now - then).abs() / then.abs().clamp_min(1e-9)).max()) < 3e-6, pair.describe()
        if pair.kind == NORM:
            stored = block.module.get_parameter(pair.source)
            assert stored.dtype == torch.bfloat16
            lost = max(lost, float((((source + pair.offset) / scale) / (stored.float() + pair.offset) - 1).abs().max()))
    assert lost > 1e-3
    assert all(block.weights[s.parameter].value.dtype == torch.float32 for pair in block.pairs for s in pair.consumers)


def test_a_channel_whose_gain_is_nothing_stays(tmp_path: Path) -> None:
    block = open_block(write("llama", tmp_path / "model", torch.bfloat16), W4)
    pair = next(p for p in block.pairs if p.kind == NORM)
    weight = block.module.get_parameter(pair.source).data.clone()
    weight[3], weight[5] = 0, 2.0**-126  # a quotient that its dtype has no number for
    block.set(pair.source, weight.float())
    block.target = block.outputs()
    before = {s.parameter: block.get(s.parameter) for s in pair.consumers}
    block.scale(pair, torch.full((pair.channels,), 2.0**30))
    assert float(block.get(pair.source)[3]) == 0
    for name, value in before.items():
        assert torch.equal(block.get(name)[:, 3], value[:, 3])
        assert bool(block.get(name).isfinite().all())


def whole(block: Block, pair: Pair, name: str) -> Tensor:
    """What a parameter multiplies by."""
    return block.get(name) + (pair.offset if name == pair.source else 0)


@pytest.mark.parametrize(
    ("kind", "kept"), [("llama", "q_proj"), ("llama", "v_proj"), ("opt", "fc1"), ("gemma2", "q_proj")]
)
def test_where_a_consumer_is_kept_factors_are_powers_of_two(kind: str, kept: str, tmp_path: Path) -> None:
    """So that what is stored in bfloat16 as it is loses nothing."""
    block = open_block(
        write(kind, tmp_path / "model", torch.bfloat16), replace(W4, keep=(kept,), loader="transformers")
    )
    touched = [
        p
        for p in block.pairs
        if any(kept in n for n in (*(s.parameter for s in p.consumers), p.source * (p.kind == LINEAR)))
    ]
    assert touched
    for pair in touched:
        names = [pair.source, *(s.parameter for s in pair.consumers)]
        before = {name: whole(block, pair, name) for name in names}
        block.scale(pair, drawn(pair.channels))
        for name in names:
            power = torch.log2((whole(block, pair, name) / before[name])[before[name] != 0])
            assert torch.equal(power, power.round()) and bool(power.any()), name
    assert apart(block.outputs(), block.target) < 1e-6


def state(block: Block) -> dict[str, Any]:
    """Everything of a block that something tried on it can change."""
    found: dict[str, Any] = {f"p {n}": p.detach().clone() for n, p in block.module.named_parameters()}
    for name, state in block.weights.items():
        for field in ("value", "input_scale", "importance", "rounded", "quantized"):
            value = getattr(state, field)
            found[f"{field} {name}"] = value.clone() if isinstance(value, Tensor) else value
    return found | {"changed": set(block.changed), "error": block._error}


def same(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    assert now.keys() == then.keys()

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return a is b or (isinstance(a, (set, float)) and a == b)

    return [name for name, value in now.items() if not equal(value, then[name])]


def everything(block: Block) -> None:
    """All that can be done to a block."""
    block.observe((Inputs,))
    block.weigh()
    block.error()
    for pair in block.pairs:
        block.scale(pair, drawn(pair.channels), shift_of(pair))
    steps.round_weights(block, RTN())
    block.error()


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("recipe", [W4, STATIC])
def test_a_trial_leaves_no_trace(recipe: Recipe, stop: bool, tmp_path: Path) -> None:
    block = open_block(write("opt", tmp_path / "model", torch.bfloat16), recipe)
    for begun in (False, True):
        if begun:  # in the middle of state as well
            everything(block)
        before = state(block)
        try:
            with block.trial():
                everything(block)
                block.scale(block.pairs[0], drawn(block.pairs[0].channels, 9))
                assert {n.split()[0] for n in same(state(block), before)} >= {"p", "value"}
                if stop:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert not same(state(block), before)
    error = block.error()
    block._error = None
    assert block.error() == error
    with block.trial() as trial:
        block.scale(block.pairs[0], drawn(block.pairs[0].channels))
        after = state(block)
        trial.keep()
    assert not same(state(block), after)


def by_hand(block: Block, rounded_input: Callable[[Tensor, str], Tensor]) -> float:
    """The error of the block with every weight as its result has it, on a copy of its module, in float64 at the end."""
    module = copy.deepcopy(block.module)
    for name, state in block.weights.items():
        assert state.quantized is not None
        q: Any = state.quantized
        scale = q.scale.double().repeat_interleave(q.codes.shape[1] // q.scale.shape[1], 1)
        module.get_parameter(name).data.copy_(q.codes.double() * scale)
        owner = module.get_submodule(name.rpartition(".")[0])

        def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> tuple[Any, ...]:
            return (rounded_input(args[0], name), *args[1:])

        owner.register_forward_pre_hook(hook)
    with torch.no_grad():
        outputs = [call.run(module, h) for call, h in zip(block.calls, block.inputs, strict=True)]
    return apart(outputs, block.target)


def test_the_error_is_what_it_says(tmp_path: Path) -> None:
    block = open_block(write("llama", tmp_path / "model"), W4)
    steps.round_weights(block, RTN())
    assert 0.01 < block.error() < 0.5
    assert block.error() == pytest.approx(by_hand(block, lambda x, _: x), rel=1e-4)
    name = next(iter(block.weights))
    block.set(name, torch.zeros_like(block.get(name)))
    steps.round_weights(block, RTN())
    assert block.error() > 0.1


@pytest.mark.parametrize("recipe", [W8A8, STATIC])
def test_the_error_counts_what_rounding_the_inputs_costs(recipe: Recipe, tmp_path: Path) -> None:
    block = open_block(write("llama", tmp_path / "model"), recipe)
    steps.round_weights(block, RTN())

    def rounded(x: Tensor, name: str) -> Tensor:
        static = block.weights[name].input_scale
        scale = x.abs().amax(-1, keepdim=True) / 127.5 if static is None else static
        return (x / scale).round().clamp(-128, 127) * scale

    assert block.error() == pytest.approx(by_hand(block, rounded), rel=1e-3)
    assert block.error() > 1.2 * by_hand(block, lambda x, _: x)


def test_without_results_weights_are_rounded_to_nearest(tmp_path: Path) -> None:
    block = open_block(write("llama", tmp_path / "model"), W4)
    before = block.error()
    assert all(torch.equal(w.view.get(block.module), w.value) for w in block.weights.values())
    steps.round_weights(block, RTN(range="mse"))
    assert block.error() == pytest.approx(before, rel=1e-6)


def owner(block: Block, parameter: str) -> nn.Module:
    """The module that has a parameter of the block."""
    return block.module.get_submodule(parameter.rpartition(".")[0])


def largest_inputs(block: Block) -> dict[str, float]:
    """The largest magnitude that enters each weight, seen by hooks of our own."""
    found: dict[str, float] = {}
    hooks = []
    for name in block.weights:

        def see(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        hooks.append(owner(block, name).register_forward_pre_hook(see))
    block.outputs()
    for hook in hooks:
        hook.remove()
    return found


def test_static_scales_are_found_and_found_again_where_a_scale_moved(tmp_path: Path) -> None:
    block = open_block(write("llama", tmp_path / "model"), STATIC)
    block.error()
    first = {name: float(state.input_scale) for name, state in block.weights.items()}  # type: ignore[arg-type]
    for name, top in largest_inputs(block).items():
        assert first[name] == pytest.approx(top / 127, rel=0.01)
    pair = block.pairs[0]
    moved = {consumer.parameter for consumer in pair.consumers}
    block.scale(pair, drawn(pair.channels))
    assert {name for name, state in block.weights.items() if state.input_scale is None} == moved
    block.error()
    for name, top in largest_inputs(block).items():
        scale = block.weights[name].input_scale
        assert scale is not None and scale.shape == (1,) and scale.dtype == torch.float32
        assert float(scale) == pytest.approx(top / 127, rel=0.01)
        assert (float(scale) == first[name]) != (name in moved)
    steps.round_weights(block, RTN())
    assert all(w.quantized.input_scale is w.input_scale for w in block.weights.values())  # type: ignore[union-attr]


def test_importance_follows_a_scale(tmp_path: Path) -> None:
    """E[x²] after a scale moved is what a new look at the inputs would find."""
    block = open_block(write("llama", tmp_path / "model"), W4)
    block.observe((Inputs,))
    block.weigh()
    for pair in block.pairs:
        block.scale(pair, drawn(pair.channels))
    found = {name: state.importance for name, state in block.weights.items()}
    block.observe((Inputs,))
    block.weigh()
    for name, state in block.weights.items():
        assert torch.allclose(found[name], state.importance, rtol=1e-3), name  # type: ignore[arg-type]


def test_relative_error_of_nothing() -> None:
    assert relative_error([torch.ones(4)], [torch.zeros(4)]) == 2
    assert relative_error([torch.zeros(4)], [torch.zeros(4)]) == 0
