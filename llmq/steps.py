"""What is done to a block in memory: transform, quantize, refine; each kept only where the block's own error falls."""

from __future__ import annotations

import time
from typing import Any

from llmq.block.block import Block, WeightState, relative_error
from llmq.errors import LlmqError
from llmq.methods import Pipeline
from llmq.methods.base import Method

INVARIANCE = 0.02


def quantize(block: Block, pipeline: Pipeline) -> None:
    """Everything a recipe's methods do to a block whose target is known: afterwards its weights are rounded in place.

    A transform stands only where the block, quantized as it will be written, is nearer to its target with it than
    without; so does a refinement. Every attempt and its outcome is recorded in the block's log.
    """
    if pipeline.transforms:
        transform(block, pipeline)
    else:
        round_weights(block, pipeline.quantizer)
    for method in pipeline.refiners:
        refine(block, method)
    block.round_in_place()


def transform(block: Block, pipeline: Pipeline) -> None:
    """Round the block's weights after its transforms, or as they were where that is nearer to the target."""
    float_output = block.outputs()
    with block.trial():
        round_weights(block, pipeline.quantizer)
        plain, results = block.error(), [(w, w.quantized, w.input_scale) for w in block.weights.values()]
    with block.trial() as trial:
        for method in pipeline.transforms:
            block.observe(method.transform_needs)
            block.weigh()
            method.transform(block)
            block.forget()
        moved = relative_error(block.outputs(), float_output)
        if moved <= INVARIANCE:
            round_weights(block, pipeline.quantizer)
            after = block.error()
        else:
            after = float("inf")
        name = "+".join(type(method).__name__ for method in pipeline.transforms)
        if after < plain:
            trial.keep()
        block.log.append({"what": name, "before": plain, "after": after, "kept": after < plain})
        if moved > INVARIANCE:
            block.log[-1] |= {"after": None, "why": f"the block's unrounded output moved by {moved:.1e}"}
    if not trial.kept:
        for state, quantized, scale in results:
            state.quantized, state.input_scale = quantized, scale


def refine(block: Block, method: Method) -> None:
    """Let a method improve on the quantized weights; what does not lower the block's error is undone."""
    before = block.error()
    with block.trial() as trial:
        method.refine(block)
        after = block.error()
        if after < before:
            trial.keep()
        line = {"what": type(method).__name__, "before": before, "after": after, "kept": after < before}
        block.log.append(line)


def round_weights(block: Block, quantizer: Method) -> None:
    """Quantize every weight from the statistics of the block as it is."""
    if not all(set(quantizer.needs) <= state.statistics.keys() for state in block.weights.values()):
        block.observe(quantizer.needs)
    last = {state.input_id: state for state in block.weights.values()}
    block.calibrate_inputs()
    for state in block.weights.values():
        began = time.perf_counter()
        try:
            found = quantizer.quantize(state.value.detach(), state.scheme, state.statistics, block.scale_dtype)
        except LlmqError as problem:
            raise LlmqError(f"{state.name}.weight: {problem}") from problem
        block.set_quantized(state.parameter, found)
        state.seconds = time.perf_counter() - began
        if last[state.input_id] is state:
            state.statistics.clear()


def row(state: WeightState) -> dict[str, Any]:
    """A weight's line of the report. error: relative, of the rounded weight to what was to be rounded."""
    assert state.quantized is not None
    return {
        "name": state.name,
        "shape": list(state.value.shape),
        "error": relative_error([state.result()], [state.value]),
        "notes": list(state.quantized.notes),
        "seconds": round(state.seconds, 3),
    }
