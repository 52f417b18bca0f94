"""The main loop: one block in memory at a time is read, quantized and written to disk before the next is read.

Read this file first. `run` is the data flow of docs/design.md; the other functions are its steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq import ranks, spill
from llmq.block.attempt import Attempt, Outcome
from llmq.block.block import Block, relative_error
from llmq.block.chains import replayed, run_unquantized
from llmq.block.state import rounded_inputs
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import check_finite
from llmq.discovery.calls import Call, Recording, States, of_length, record
from llmq.discovery.parameters import empty
from llmq.discovery.tail import Tail
from llmq.errors import LlmqError
from llmq.machine import device_memory, give_back, peak_memory, resident_memory
from llmq.planning.budget import KEPT, kept_bytes
from llmq.planning.plan import BlockPlan, Plan
from llmq.streaming import keys, mixture, steps
from llmq.streaming.block_io import BlockIO, pack_weights, rest
from llmq.streaming.block_reader import BlockReader, discard
from llmq.training import distill
from llmq.watch import Watch

SIGNATURE_VALUES = 256
SIGNATURE_TOLERANCE = 1e-3
BEFORE = "before quantization: it overflows, or its weights are damaged"


def run(plan: Plan, sink: Sink, device: torch.device, watch: Watch) -> None:
    """Quantize every block of the plan into the sink, resuming an interrupted run, then verify the written folder.

    Raises LlmqError naming the weight or file; finished blocks are kept, and the same call resumes after them.
    """
    io = BlockIO(plan, device, sink)
    copy_rest(io, watch)
    if not plan.blocks:
        verify_rest(io, watch)
        return
    ranks.deal(len(plan.batches), max(1, KEPT // kept_bytes(plan)))
    recording = record_calls(io, watch)
    states, recording.hidden = recording.states(), recording.hidden[:1]
    first = states if plan.pipeline.tuner is not None else []
    float_states = states if plan.pipeline.float_target else None
    todo = [block for block in plan.blocks if block.unit not in sink.done]
    watch.stage("Quantizing", sum(len(block.units) for block in plan.blocks))
    for block in plan.blocks[: todo[0].index] if todo else []:
        if float_states is not None:
            float_states = unquantized(io, block, float_states, recording)
        states = replay(io, block, states, recording)
        for unit in block.units:
            watch.step(f"{unit} was already done")
    for block in todo:
        for following in plan.blocks[block.index + 1 : block.index + 2]:
            io.expect(following)
        states, float_states = quantize_block(io, block, states, float_states, recording, watch)
        give_back()
        watch.step(f"{block.unit}: output error {sink.done[block.unit]['error']:.2e}")
    if plan.pipeline.tuner is not None:
        teacher = partial(teach, io, first, float_states if todo else None, recording, watch)
        distill.run(io, recording, first, teacher, output_signature, watch)
        del teacher
    del states, float_states, first
    verify(io, recording, watch)
    verify_rest(io, watch)


def quantize_block(
    io: BlockIO,
    planned: BlockPlan,
    states: list[States],
    float_states: list[States] | None,
    recording: Recording,
    watch: Watch,
) -> tuple[list[States], list[States] | None]:
    """Read, observe, quantize, run again and commit one block; returns its quantized output, the next one's input.

    float_states: those of the unquantized model, if a method's target is computed from them; the block's output for
    them is then returned too.
    """
    began = time.perf_counter()
    pipeline = io.plan.pipeline
    aim = hidden_of(states if float_states is None else float_states)
    calls = recording.of_block(planned.index, states if float_states is None else float_states)
    unquantized = None if float_states is None else (aim, calls)
    block = io.open(planned, hidden_of(states), recording.of_block(planned.index, states), unquantized)
    with mixture.without_experts(planned):
        if pipeline.corrects:
            target = run_unquantized(block, lambda index: calls[index].step(block.module, aim[index], io.device))
        else:
            # Where statistics are collected in passes, this is not one of them.
            target = [States(h) for h in block.observe(() if spill.saves(spill.Saving.PASSES) else pipeline.first)]
            check_output(planned.name, target, BEFORE)
            target = target if float_states is None else forward(block.module, aim, calls, io.device)
        check_output(planned.name, target, BEFORE)
        block.target = hidden_of(target)
    before = [] if planned.experts is None else mixture.entering(planned, aim, calls, io.device)
    with mixture.without_experts(planned), io.tail(planned) as tail:
        block.tail = tail_for(block, tail)
        steps.quantize(block, pipeline)
    rows, tensors = pack_weights(planned, block) if ranks.first() else ([], {})
    tensors |= io.untouched(planned, block.changed) if ranks.first() else {}
    spill.rest()
    weights = list(block.weights.values())
    if planned.parts is not None or planned.experts is not None:
        block.replays = None  # Experts have other values, or are not run with the block.
    if planned.parts is not None:
        with rounded_inputs(block.module, block.weights.values()):
            weights += mixture.quantize_parts(io, planned, block, watch)
    with keys.largest(io.plan, planned) as seen:
        if planned.experts is None:
            with rounded_inputs(block.module, weights):
                output = forward(block.module, block.inputs, block.calls, io.device, partial(replayed, block))
                block.replays = None
        else:
            output, sums, routing = mixture.quantize_rest(io, planned, block, before, watch)
    scales = keys.scales(io.plan, planned, seen)
    if planned.experts is not None:
        io.fill(planned)
        target = mixture.outputs(planned, aim, calls, sums, io.device)
        check_output(planned.name, target, BEFORE)
    check_output(
        planned.name, output, "after quantization, although it was before: exclude its worst weights with --keep"
    )
    error = relative_error(hidden_of(output), hidden_of(target), batches=True)
    zero = not any(ranks.everyone(any(bool(one.hidden.any()) for one in target)))
    payload = {"weights": rows, "error": error}
    payload |= {"signature": output_signature(output[0].hidden)} if ranks.first() else {}
    if planned.experts is not None:
        payload |= {"routing": routing}
    if scales:
        payload |= {"cache": keys.told(scales)}
    if zero:
        payload |= {"zero": True}
    payload |= {"log": [asdict(attempt) for attempt in block.log], "seconds": round(time.perf_counter() - began, 3)}
    payload |= {"memory": resident_memory(), "peak": peak_memory()}
    if (on_device := device_memory(io.device)) is not None:
        payload |= {"device": on_device}
    discard(block.module)
    io.sink.commit(planned.unit, tensors | scales, payload)
    return output, None if float_states is None else target


def tail_for(block: Block, tail: Tail | None) -> Tail | None:
    """What follows the last block, if it can be run on the block's target token by token; else the log says why not."""
    if tail is None:
        return None
    why = None
    try:
        if ranks.first():
            tail.check(block.target[0][:1].to(block.device, torch.float32))
    except LlmqError as problem:
        why = str(problem)
    if (why := ranks.tell(why)) is not None:
        block.log.append(Attempt("logits", None, None, None, Outcome.SKIPPED, why=why))
        return None
    return tail


def hidden_of(states: list[States]) -> list[Tensor]:
    """The hidden states of every batch."""
    return [one.hidden for one in states]


def unquantized(io: BlockIO, block: BlockPlan, float_states: list[States], recording: Recording) -> list[States]:
    """The unquantized block's output for the unquantized model's states."""
    module, hidden, calls = io.fill(block), hidden_of(float_states), recording.of_block(block.index, float_states)
    if block.experts is None:
        output = forward(module, hidden, calls, io.device)
    else:
        sums = mixture.unrounded(io, block, mixture.entering(block, hidden, calls, io.device))
        output = mixture.outputs(block, hidden, calls, sums, io.device)
    discard(module)
    return output


def teach(
    io: BlockIO, first: list[States], known: list[States] | None, recording: Recording, watch: Watch
) -> list[Tensor]:
    """The unquantized model's last hidden states, batch by batch. known: its states, if they are there already."""
    states = known
    if states is None:
        states = first
        watch.stage("Running the unquantized model", len(io.plan.blocks))
        for block in io.plan.blocks:
            states = unquantized(io, block, states, recording)
            watch.step(block.unit)
    return hidden_of(states)


def replay(io: BlockIO, block: BlockPlan, states: list[States], recording: Recording) -> list[States]:
    """The output of a written block, after comparing it with the output that the block had in memory."""
    output = rerun(io, block, states, recording)
    if ranks.first():
        check_signature(io.sink.done[block.unit], output[0].hidden, block.name)
    give_back()
    return output


def rerun(io: BlockIO, block: BlockPlan, states: list[States], recording: Recording) -> list[States]:
    """The output of a written block, which is freed again."""
    hidden, calls = hidden_of(states), recording.of_block(block.index, states)
    with rounded_inputs(block.module, io.restore(block)):
        if block.experts is None:
            output = forward(block.module, hidden, calls, io.device)
        else:
            sums = mixture.restored(io, block, mixture.entering(block, hidden, calls, io.device))
            output = mixture.outputs(block, hidden, calls, sums, io.device)
    discard(block.module)
    return output


def record_calls(io: BlockReader, watch: Watch, batches: Sequence[Tensor] | None = None) -> Recording:
    """Each block's own call for every batch of calibration windows, and the first block's input; on the CPU.

    batches: token ids [windows, tokens] in place of this rank's of the plan's.
    """
    plan, model = io.plan, io.plan.model
    if batches is None:
        batches = [plan.batches[i] for i in ranks.mine(len(plan.batches))]
    if not batches:
        return Recording()
    first = plan.blocks[0]
    mine = [f"{first.name}.{n}" for n, _ in first.module.named_parameters() if n not in first.streamed]
    needed = [*sorted(plan.structure.outside), *mine]
    for name in needed:
        io.load(name, torch.device("cpu"))
    watch.stage("Recording calls", len(batches))
    with of_length("the model", batches[0].shape[1]), mixture.without_experts(first):
        recording = record(model, [block.module for block in plan.blocks], _ticking(batches, watch))
    for name in needed:
        empty(model, name)
    return recording


def _ticking(batches: Sequence[Tensor], watch: Watch) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        watch.step("")


def forward(
    block: nn.Module,
    hidden: list[Tensor],
    calls: list[Call],
    device: torch.device,
    within: Callable[[int], AbstractContextManager[object]] = lambda index: nullcontext(),
) -> list[States]:
    """What the block hands to later ones for each batch, on the CPU, in the model's dtype.

    within: the context in which a batch is run.
    """
    outputs = []
    with torch.no_grad(), of_length("a block", hidden[0].shape[-2] if hidden else 0):
        for index, (h, call) in enumerate(zip(hidden, calls, strict=True)):
            with within(index):
                outputs.append(call.step(block, h, device))
    return outputs


def check_output(name: str, output: list[States], when: str) -> None:
    """Raise LlmqError if a block's output is not finite."""
    for one in output:
        spill.rest(spill.Saving.STATES)
        if not bool(torch.isfinite(one.hidden).all()):
            raise LlmqError(f"{name}: its output is not finite {when}")


def copy_rest(io: BlockIO, watch: Watch) -> None:
    """Copy all tensors outside the blocks, in shards of up to 256 MiB; quantize those that are included."""
    source, units, outside = io.plan.source, rest(io.plan), io.plan.outside
    watch.stage("Copying", len(units))
    for unit, names in units.items():
        if unit not in io.sink.done:
            tensors: dict[str, Tensor] = {}
            rows, signatures = [], {}
            for name in names if ranks.first() else ():
                if name in outside:
                    row, packed, values = io.round_outside(outside[name])
                    tensors |= packed
                    rows.append(row)
                    signatures[name] = output_signature(values)
                else:
                    tensors[name] = source.read(name)
                    check_finite(tensors[name], name, source.info(name).file)
            io.sink.commit(unit, tensors, {"weights": rows, "signatures": signatures} if rows else {})
        watch.step(unit)


def output_signature(hidden: Tensor) -> list[float]:
    """A signature of a block's output for later comparison: its norm, and values at fixed random positions."""
    flat = hidden.flatten()
    places = torch.randint(flat.numel(), (SIGNATURE_VALUES,), generator=torch.Generator().manual_seed(0))
    return [float(torch.linalg.vector_norm(flat.float())), *flat[places].float().tolist()]


def check_signature(payload: Mapping[str, Any], hidden: Tensor, name: str) -> None:
    """Raise LlmqError if a block that was read back has a different output than it had in memory."""
    then, now = (torch.tensor(s, dtype=torch.float64) for s in (payload["signature"], output_signature(hidden)))
    # The values at a few places may all be zero where the output is not.
    usual = then[0] * math.sqrt(SIGNATURE_VALUES / max(1, hidden.numel()))
    changes = ((then - now)[1:].norm(), torch.maximum(then[1:].norm(), usual)), ((then - now)[0].abs(), then[0])
    # An output that was zero and still is has not changed, although nothing is relative to it.
    apart = max(float(change / whole) if change else 0.0 for change, whole in changes)
    if not apart <= SIGNATURE_TOLERANCE:
        raise LlmqError(
            f"{name}: read back from disk, its output differs from the one in memory (relative difference "
            f"{apart:.1e}); "
            "the disk or memory is faulty, another program changed the folder, or the run was started on another "
            "machine: "
            "delete the folder and run again"
        )


def verify(io: BlockIO, recording: Recording, watch: Watch) -> None:
    """Read back every written block and compare its output on the first batch with the one it had in memory.

    The rank that has this batch does it.
    """
    if not ranks.first():
        return
    states = recording.states()[:1]
    watch.stage("Verifying", len(io.plan.blocks))
    with ranks.alone():
        for block in io.plan.blocks:
            states = replay(io, block, states, recording)
            watch.step("")


def verify_rest(io: BlockIO, watch: Watch) -> None:
    """Read back every quantized weight outside the blocks and compare it with the one in memory."""
    outside = io.plan.outside
    if not outside or not ranks.first():
        return
    watch.stage("Verifying what is outside the blocks", len(outside))
    for unit in rest(io.plan):
        for tensor, signature in io.sink.done[unit].get("signatures", {}).items():
            check_signature({"signature": signature}, io.read_back(outside[tensor]), tensor)
            watch.step("")
