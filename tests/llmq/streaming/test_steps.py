"""What is done to a block stands only where it helps: methods made to do harm are undone, and the log says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import Block
from llmq.block.state import rounded_inputs
from llmq.block.statistics import Hessian, Inputs
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.grids.scheme import Activations, Scheme
from llmq.methods import Pipeline
from llmq.methods.base import Method, Stats
from llmq.methods.gptq import GPTQ
from llmq.methods.rtn import RTN
from llmq.recipe.recipe import Recipe
from llmq.streaming import steps
from tests.llmq.blocks import apart, open_block

W4 = Recipe(methods=("awq",), scheme=Scheme(4, 16))
W3 = Recipe(methods=("awq",), scheme=Scheme(3, 32))
STATIC = Recipe(methods=("smoothquant",), scheme=Scheme(8, None, activations=Activations(dynamic=False)))


class Spread(Method):
    """Leaves the function alone and makes rounding cost far more: factors from 1/64 to 64 within every group."""

    transform_needs = (Inputs,)

    def transform(self, block: Block) -> None:
        for pair in block.pairs:
            block.scale(pair, torch.exp2(torch.arange(pair.channels) % 13 - 6.0))


class Gather(Method):
    """The inverse of what `spoil` did to the block."""

    def transform(self, block: Block) -> None:
        for pair in block.pairs:
            block.scale(pair, torch.exp2(6.0 - torch.arange(pair.channels) % 13))


class Careless(Method):
    """Changes the function: whatever the error is then, it does not stand."""

    def transform(self, block: Block) -> None:
        name = next(iter(block.weights))
        block.set(name, block.get(name) * 3)


class Cheat(Method):
    """Changes the function to one that is nearer to its target once rounded: that is a quantizer's state."""

    transform_needs = (Hessian,)

    def transform(self, block: Block) -> None:
        for name, state in block.weights.items():
            found = GPTQ().quantize(state.value, state.scheme, state.statistics, block.scale_dtype)
            block.set(name, found.dequantize(torch.float32))


class Zero(Method):
    """A refinement that loses everything."""

    def refine(self, block: Block) -> None:
        for name, state in block.weights.items():
            q: Any = state.quantized
            block.set_quantized(name, replace(q, codes=torch.zeros_like(q.codes)))


class Better(Method):
    """A refinement: GPTQ in place of rounding."""

    def refine(self, block: Block) -> None:
        block.observe((Hessian,))
        for name, state in block.weights.items():
            block.set_quantized(name, GPTQ().quantize(state.value, state.scheme, state.statistics, block.scale_dtype))


def pipeline(*transforms: Method, quantizer: Method | None = None, refine: tuple[Method, ...] = ()) -> Pipeline:
    return Pipeline(transforms, quantizer or RTN(), refine)


def results(block: Block) -> dict[str, tuple[bytes, ...]]:
    """Everything written of a block: codes, scales, input scales, the other parameters."""
    found = {}
    for name, state in block.weights.items():
        q: Any = state.quantized
        assert (state.input_scale is None) == (q.input_scale is None)
        scale = b"" if q.input_scale is None else q.input_scale.numpy().tobytes()
        found[name] = (q.codes.numpy().tobytes(), q.scale.float().numpy().tobytes(), scale)
    for name in {n for n, _ in block.module.named_parameters()} - block.weights.keys():
        found[name] = (block.module.get_parameter(name).float().numpy().tobytes(),)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "recipe"),
    [(Spread, W4), (Spread, STATIC), (Careless, W4), (Careless, STATIC), (Cheat, W3)],
)
@pytest.mark.parametrize("quantizer", [RTN, GPTQ])
def test_a_transform_that_does_harm_is_undone(
    bad: Callable[[], Method], quantizer: Callable[[], Method], recipe: Recipe, tiny_model: Path
) -> None:
    plain, tried = open_block(tiny_model, recipe), open_block(tiny_model, recipe)
    steps.quantize(plain, pipeline(quantizer=quantizer()))
    steps.quantize(tried, pipeline(bad(), quantizer=quantizer()))
    assert results(tried) == results(plain)
    assert not tried.changed
    (line,) = tried.log
    assert line.method == bad.__name__ and line.outcome is Outcome.UNDONE  # type: ignore[attr-defined]
    assert line.before == pytest.approx(plain.error(), rel=1e-5)
    if bad is not Spread:
        assert line.after is None and "unrounded output changed" in line.why
    else:
        assert line.after is not None and line.before is not None and line.after > line.before


def test_a_transform_that_helps_stands(tiny_model: Path) -> None:
    plain, tried = open_block(tiny_model, W4), open_block(tiny_model, W4)
    for block in (plain, tried):
        Spread().transform(block)
        block.changed.clear()
    target = tried.target
    steps.quantize(plain, pipeline())
    steps.quantize(tried, pipeline(Gather()))
    (line,) = tried.log
    assert line.outcome is Outcome.KEPT and line.after is not None and line.before is not None
    assert line.after < 0.5 * line.before
    assert results(tried) != results(plain)
    assert tried.changed == {p.source for p in tried.pairs} - tried.weights.keys()
    # The weights of the block are the rounded ones by now: its output is off by just the error that was logged.
    assert apart(tried.outputs(), target) == pytest.approx(line.after, rel=1e-4)
    assert apart(plain.outputs(), target) == pytest.approx(line.before, rel=1e-4)


def test_several_transforms_stand_or_fall_together(tiny_model: Path) -> None:
    block = open_block(tiny_model, W4)
    steps.quantize(block, pipeline(Spread(), Gather()))
    assert [line.method for line in block.log] == ["Spread+Gather"]


@pytest.mark.parametrize("recipe", [W4, STATIC])
def test_a_refinement_that_does_harm_is_undone(recipe: Recipe, tiny_model: Path) -> None:
    plain, tried = open_block(tiny_model, recipe), open_block(tiny_model, recipe)
    steps.quantize(plain, pipeline())
    steps.quantize(tried, pipeline(refine=(Zero(),)))
    assert results(tried) == results(plain)
    (line,) = tried.log
    assert (line.method, line.where, line.outcome) == ("Zero", None, Outcome.UNDONE)
    assert line.after is not None and line.before is not None
    assert line.after > line.before == pytest.approx(plain.error(), rel=1e-5)


def test_a_refinement_that_helps_stands(tiny_model: Path) -> None:
    block = open_block(tiny_model, W4)
    steps.quantize(block, pipeline(refine=(Better(), Zero())))
    first, second = block.log
    assert [(line.method, line.outcome) for line in block.log] == [("Better", Outcome.KEPT), ("Zero", Outcome.UNDONE)]
    assert first.before is not None and first.after is not None
    assert second.before == first.after < first.before
    assert apart(block.outputs(), block.target) == pytest.approx(first.after, rel=1e-4)


@pytest.mark.parametrize("recipe", [W4, STATIC])
def test_a_refinement_is_given_the_statistics_that_it_asks_for(recipe: Recipe, tiny_model: Path) -> None:
    """Of the inputs that weights meet in the written model: those of the block as quantized, rounded as schemes say."""
    seen: dict[str, torch.Tensor] = {}

    class Asking(Method):
        refine_needs = (Inputs, Hessian)

        def refine(self, block: Block) -> str | None:
            for name, state in block.weights.items():
                assert state.statistics.keys() == {Inputs, Hessian}
                seen[name] = state.statistics[Hessian].total.clone()
            return "it only looked"

    block = open_block(tiny_model, recipe)
    steps.quantize(block, pipeline(refine=(Asking(),)))
    assert all(not state.statistics for state in block.weights.values())
    # By now the block's weights are the rounded ones.
    with rounded_inputs(block.module, block.weights.values()):
        block.observe((Hessian,))
    for name, state in block.weights.items():
        assert torch.allclose(seen[name], state.statistics[Hessian].total, rtol=1e-4, atol=1e-4)


class Idle(Method):
    """Finds nothing to do, after having changed something."""

    def transform(self, block: Block) -> str | None:
        Careless().transform(block)
        return "no place for it"

    def refine(self, block: Block) -> str | None:
        Zero().refine(block)
        return "nothing is left"


def test_a_method_may_have_nothing_to_do(tiny_model: Path) -> None:
    plain, tried = open_block(tiny_model, W4), open_block(tiny_model, W4)
    steps.quantize(plain, pipeline())
    steps.quantize(tried, pipeline(Idle(), refine=(Idle(),)))
    assert results(tried) == results(plain) and not tried.changed
    assert tried.log == [
        Attempt("Idle", None, None, None, Outcome.SKIPPED, why="no place for it"),
        Attempt("Idle", None, None, None, Outcome.SKIPPED, why="nothing is left"),
    ]


def test_a_transform_with_nothing_to_do_leaves_the_others_alone(tiny_model: Path) -> None:
    class Content(Method):
        def transform(self, block: Block) -> str | None:
            return "no place for it"

    plain, tried = open_block(tiny_model, W4), open_block(tiny_model, W4)
    for block in (plain, tried):
        Spread().transform(block)
        block.changed.clear()
    steps.quantize(plain, pipeline(Gather()))
    steps.quantize(tried, pipeline(Content(), Gather()))
    assert results(tried) == results(plain)
    assert [(line.method, line.outcome) for line in tried.log] == [
        ("Content", Outcome.SKIPPED),
        ("Gather", Outcome.KEPT),
    ]


def test_statistics_are_those_of_the_block_after_the_transform(tiny_model: Path) -> None:
    """A quantizer behind a transform sees what the changed weights are fed, not what they were fed before."""
    seen: list[dict[str, torch.Tensor]] = []

    class Noting(GPTQ):
        def quantize(self, weight: torch.Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
            seen[-1][str(len(seen[-1]))] = stats[Hessian].total.diagonal().clone()
            return super().quantize(weight, scheme, stats, scale_dtype)

    class Begin(Spread):
        transform_needs = (Hessian,)

        def transform(self, block: Block) -> None:
            seen.append({})
            super().transform(block)

    seen.append({})
    block = open_block(tiny_model, W4)
    steps.transform(block, pipeline(Begin(), quantizer=Noting()))
    before, after = seen
    names = list(block.weights)
    pair = block.pairs[0]
    factor = torch.exp2(torch.arange(pair.channels) % 13 - 6.0)
    for consumer in pair.consumers:
        index = str(names.index(consumer.parameter))
        assert torch.allclose(after[index] * factor[consumer.channel] ** 2, before[index], rtol=1e-3)


def test_a_weight_that_cannot_be_rounded_is_named(tiny_model: Path) -> None:
    class Picky(RTN):
        def quantize(self, weight: torch.Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
            raise LlmqError("not this one")

    block = open_block(tiny_model, W4)
    first = next(iter(block.weights.values())).name
    with pytest.raises(LlmqError, match=f"{first}.weight: not this one"):
        steps.quantize(block, pipeline(quantizer=Picky()))
