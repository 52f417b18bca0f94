"""The steps on a block in memory: transform, quantize, refine; a change is kept only if the block's error falls."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from llmq import ranks
from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import Block, WeightState, relative_error
from llmq.block.chains import Chains, stages
from llmq.block.siblings import join
from llmq.block.statistics import in_passes
from llmq.errors import LlmqError
from llmq.grids.base import Quantized, QuantizedWeight, joined, pieces
from llmq.machine import give_back
from llmq.methods import Pipeline
from llmq.methods._correction import correct
from llmq.methods.base import Method, Stats
from llmq.spill import Saving, keep_all, rest, saves

INVARIANCE = 0.02
LOGITS = "the divergence of the model's logits, in nats"


def quantize(block: Block, pipeline: Pipeline) -> None:
    """Run a recipe's methods on a block whose target is known; afterwards its weights are rounded in place.

    A transform or refinement is kept only if it lowers the error of the block, quantized as it will be written. A
    method that reports that there is nothing to do in the block is not judged. Every attempt and its outcome is
    recorded in the block's log.
    """
    if pipeline.transforms:
        transform(block, pipeline)
    else:
        round_weights(block, pipeline.quantizer)
    if pipeline.refiners:
        block.replays = None
    for method in pipeline.refiners:
        refine(block, method)
    join(block)
    block.round_in_place()


def transform(block: Block, pipeline: Pipeline) -> None:
    """Quantize the block's weights with its transforms, or without them if that has the lower error."""
    float_output = block.outputs()
    with block.trial():
        round_weights(block, pipeline.quantizer)
        plain, results = block.error(), [(w, w.quantized, w.input_scale) for w in block.weights.values()]
    with block.trial() as trial:
        used = []
        for method in pipeline.transforms:
            block.observe(method.transform_needs)
            block.weigh()
            nothing = method.transform(block)
            block.forget()
            if nothing is None:
                used.append(method)
            else:
                skip(block, method, nothing)
        if used and judge(block, pipeline.quantizer, used, plain, float_output):
            trial.keep()
    if not trial.kept:
        for state, quantized, scale in results:
            state.quantized, state.input_scale = quantized, scale


def judge(block: Block, quantizer: Method, used: list[Method], plain: float, float_output: list[Tensor]) -> bool:
    """Quantize the transformed block; returns whether its error is lower than without transforms, and logs it.

    plain: the block's error without the transforms; float_output: its unrounded output without transforms, which they
    must not change.
    """
    moved = relative_error(block.outputs(), float_output, batches=True)
    if moved > INVARIANCE:
        why = f"the block's unrounded output changed by {moved:.1e}"
        block.log.append(Attempt(name(*used), None, plain, None, Outcome.UNDONE, why=why))
        return False
    round_weights(block, quantizer)
    return better(block, name(*used), plain)


def refine(block: Block, method: Method) -> None:
    """Let a method improve the quantized weights; the change is undone if it does not lower the block's error.

    Its statistics are those of the block as quantized so far, with inputs rounded as schemes say. The last block's
    error is that of the model's logits if the method wants it (`Method.logits`).
    """
    with block.judging_logits(method.logits):
        before = block.error()
        if method.refine_needs:
            with block.rounding():
                block.observe(method.refine_needs)
        with block.trial() as trial:
            nothing = method.refine(block)
            if nothing is not None:
                skip(block, method, nothing)
            elif better(block, name(method), before):
                trial.keep()
    block.forget()


def better(block: Block, what: str, before: float) -> bool:
    """Whether the block's error is lower than before; the outcome is logged."""
    after = block.error()
    outcome = Outcome.KEPT if after < before else Outcome.UNDONE
    block.log.append(Attempt(what, None, before, after, outcome, why=LOGITS if block.by_logits else ""))
    return after < before


def skip(block: Block, method: Method, why: str) -> None:
    """Log that a method had nothing to do in the block."""
    block.log.append(Attempt(name(method), None, None, None, Outcome.SKIPPED, why=why))


def name(*methods: Method) -> str:
    """The name in the log of methods that are judged together."""
    return "+".join(type(method).__name__ for method in methods)


def round_weights(block: Block, quantizer: Method) -> None:
    """Quantize every weight with the statistics of the current block, corrected for earlier errors if it says so."""
    if quantizer.correct != "none" and block.unquantized is not None:
        round_in_order(block, quantizer)
        return
    needs, states = quantizer.quantize_needs, list(block.weights.values())
    missing = not all(set(needs) <= state.statistics.keys() for state in states)
    some = block.in_passes and saves(Saving.PASSES)
    if missing and not some:
        block.observe(needs)
    block.calibrate_inputs()
    shares = dict(zip(block.weights, share(states, quantizer), strict=True))
    widths = {state.input_id: state.value.shape[1] for state in states}
    for inputs in in_passes(widths, needs) if missing and some else [list(widths)]:
        group = [state for state in states if state.input_id in inputs]
        if missing and some:
            block.observe_inputs(needs, group)
        rest()
        last = {state.input_id: state for state in group}
        for state in group:
            if (rows := shares[state.parameter].get(ranks.rank())) is not None:
                round_weight(block, quantizer, state, state.value[rows].detach(), state.statistics)
            if last[state.input_id] is state:
                state.statistics.clear()
    exchange(block, states, list(shares.values()))


def round_in_order(block: Block, quantizer: Method) -> None:
    """Quantize the weights in their order of use, each corrected for the errors of those before it."""
    block.calibrate_inputs()
    chains = Chains(block)
    for states in stages(block):
        shares = share(states, quantizer)
        mine = [owners.get(ranks.rank()) for owners in shares]
        corrected, statistics = correct(block, states, chains, quantizer.quantize_needs, quantizer.correct, mine)
        for state in states:
            if (found := corrected.pop(0)) is not None:
                round_weight(block, quantizer, state, found.value, statistics)
                state.correction = found.strengths
            del found
        del statistics
        exchange(block, states, shares)
        chains.round(states)
        give_back()
    block.shown = None


def share(states: Sequence[WeightState], quantizer: Method) -> list[dict[int, slice]]:
    """Of each weight, which rank quantizes which rows, in their order: whole pieces of it, by about what that takes."""
    jobs = []
    for number, state in enumerate(states):
        parts = [slice(0, len(state.value))]
        if quantizer.apart(state.scheme):
            parts = pieces(len(state.value), state.scheme, state.value.device)
        jobs += [(number, part) for part in parts]
    costs = [(piece.stop - piece.start) * states[number].value.shape[1] ** 2 for number, piece in jobs]
    found: list[dict[int, slice]] = [{} for _ in states]
    for (number, piece), owner in zip(jobs, ranks.share(costs), strict=True):
        found[number][owner] = slice(found[number].get(owner, piece).start, piece.stop)
    return found


def exchange(block: Block, states: Sequence[WeightState], shares: Sequence[dict[int, slice]]) -> None:
    """Let all ranks have the result of each weight, from those that quantized its rows."""
    if ranks.size() == 1:
        return
    for state, owners in zip(states, shares, strict=True):
        found = (state.quantized, state.correction, state.seconds)
        told = [ranks.tell(found, owner, block.device) for owner in owners]
        state.correction = told[0][1]
        state.seconds = sum(seconds for _, _, seconds in told)
        whole = _joined([quantized for quantized, _, _ in told])
        block.set_quantized(state.parameter, keep_all(whole, Saving.PASSES))


def _joined(parts: Sequence[Quantized | None]) -> Quantized:
    """A weight of which ranks quantized some rows each."""
    if len(parts) > 1:
        return joined([part for part in parts if isinstance(part, QuantizedWeight)])
    assert parts[0] is not None
    return parts[0]


def round_weight(block: Block, quantizer: Method, state: WeightState, value: Tensor, statistics: Stats) -> None:
    """Quantize a weight, or what takes its place, or some of its rows, [out, in]."""
    began = time.perf_counter()
    try:
        found = quantizer.quantize(value, state.scheme, statistics, block.scale_dtype)
    except LlmqError as problem:
        raise LlmqError(f"{state.name}.weight: {problem}") from problem
    block.set_quantized(state.parameter, keep_all(found, Saving.PASSES))
    state.seconds = time.perf_counter() - began
