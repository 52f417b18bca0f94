"""THE loop: one block in memory at a time, read from the checkpoint, quantized, on disk before the next is read.

Read this file first. `run` is the data flow of docs/design.md; everything else here is a step of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from llmq import formats, steps
from llmq.block.block import Block, relative_error, rounded_inputs
from llmq.block_io import discard, fill, load, open_block, rest, restore, untouched
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import check_finite
from llmq.discovery.calls import Call, Recording, record
from llmq.discovery.parameters import empty
from llmq.errors import LlmqError
from llmq.machine import device_memory, give_back, peak_memory, resident_memory
from llmq.planning.memory import before_blocks
from llmq.planning.plan import Plan
from llmq.watch import Watch

SIGNATURE_VALUES = 256
SIGNATURE_TOLERANCE = 1e-3


def run(plan: Plan, sink: Sink, device: torch.device, watch: Watch) -> None:
    """Quantize every block of the plan into the sink, resuming where it stopped, then verify what was written.

    Raises LlmqError naming the weight or file; finished blocks are kept, and the same call goes on from there.
    """
    copy_rest(plan, sink, watch)
    recording = record_calls(plan, device, watch)
    hidden, recording.hidden = recording.hidden, recording.hidden[:1]
    float_hidden = hidden if plan.pipeline.float_target else None
    units = [f"block {i}" for i in range(len(plan.structure.blocks))]
    todo = [i for i, unit in enumerate(units) if unit not in sink.done]
    watch.stage("Quantizing", len(units))
    for index in range(todo[0] if todo else 0):
        calls = [calls[index] for calls in recording.calls]
        if float_hidden is not None:
            float_hidden = unquantized(plan, index, float_hidden, calls, device)
        hidden = replay(plan, sink, index, hidden, calls, device)
        watch.step(f"{units[index]} was already done")
    for index in todo:
        calls = [calls[index] for calls in recording.calls]
        hidden, float_hidden = quantize_block(plan, sink, index, hidden, float_hidden, calls, device)
        give_back()
        watch.step(f"{units[index]}: output error {sink.done[units[index]]['error']:.2e}")
    del hidden, float_hidden
    verify(plan, sink, recording, device, watch)


def quantize_block(
    plan: Plan,
    sink: Sink,
    index: int,
    hidden: list[Tensor],
    float_hidden: list[Tensor] | None,
    calls: list[Call],
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Read, observe, quantize, run again and commit one block; returns its quantized output, the next one's input.

    float_hidden: the unquantized model's hidden states, where a method's target is what this block makes of them; the
    block's output for them is returned too.
    """
    began = time.perf_counter()
    block = open_block(plan, index, hidden, calls, device)
    block.target = block.observe(plan.pipeline.first)
    check_output(plan, index, block.target, "before any quantization: it overflows, or its weights are damaged")
    if float_hidden is not None:
        float_hidden = block.target if float_hidden is hidden else forward(block.module, float_hidden, calls, device)
        block.target = float_hidden
    steps.quantize(block, plan.pipeline)
    rows, tensors = pack_weights(plan, index, block)
    tensors |= untouched(plan, index, block)
    with rounded_inputs(block.module, block.weights.values()):
        output = block.outputs()
    check_output(plan, index, output, "after quantization, though it was before: keep its worst weights with --keep")
    payload = {"weights": rows, "error": relative_error(output, block.target), "signature": output_signature(output[0])}
    payload |= {"log": block.log, "seconds": round(time.perf_counter() - began, 3)}
    payload |= {"memory": resident_memory(), "peak": peak_memory()}
    if (on_device := device_memory(device)) is not None:
        payload |= {"device": on_device}
    discard(block.module)
    sink.commit(f"block {index}", tensors, payload)
    return output, float_hidden


def unquantized(
    plan: Plan, index: int, float_hidden: list[Tensor], calls: list[Call], device: torch.device
) -> list[Tensor]:
    """What the unquantized block makes of the unquantized model's hidden states."""
    block = fill(plan, index, device)
    output = forward(block, float_hidden, calls, device)
    discard(block)
    return output


def replay(
    plan: Plan, sink: Sink, index: int, hidden: list[Tensor], calls: list[Call], device: torch.device
) -> list[Tensor]:
    """The output of a block as it was written, compared with the one it had in memory."""
    states = restore(plan, sink, index, device)
    block = plan.model.get_submodule(plan.structure.blocks[index].name)
    with rounded_inputs(block, states):
        output = forward(block, hidden, calls, device)
    check_signature(sink.done[f"block {index}"], output[0], plan.structure.blocks[index].name)
    discard(block)
    give_back()
    return output


def record_calls(plan: Plan, device: torch.device, watch: Watch) -> Recording:
    """Each block's own call for every batch of calibration windows, and the first block's input; on the host."""
    model = plan.model
    blocks = [model.get_submodule(block.name) for block in plan.structure.blocks]
    paths = [block.name for block in plan.structure.blocks]
    inside = [f"{path}.{n}" for path, m in zip(paths, blocks, strict=True) for n, _ in m.named_parameters()]
    needed = [*before_blocks(model, inside), *(n for n in inside if n.startswith(paths[0] + "."))]
    for name in needed:
        load(plan, name, torch.device("cpu"))
    batches = list(torch.split(plan.ids, plan.batch))
    watch.stage("Recording calls", len(batches))
    recording = record(model, blocks, _ticking(batches, watch))
    for name in needed:
        empty(model, name)
    return recording


def _ticking(batches: list[Tensor], watch: Watch) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        watch.step("")


def forward(block: nn.Module, hidden: list[Tensor], calls: list[Call], device: torch.device) -> list[Tensor]:
    """The block's output for each batch, on the host in the model's dtype."""
    with torch.no_grad():
        return [call.run(block, h.to(device)).to(h) for h, call in zip(hidden, calls, strict=True)]


def check_output(plan: Plan, index: int, output: list[Tensor], when: str) -> None:
    """Raise LlmqError where a block's output is not finite."""
    if not all(bool(torch.isfinite(t).all()) for t in output):
        raise LlmqError(f"{plan.structure.blocks[index].name}: its output is not finite {when}")


def pack_weights(plan: Plan, index: int, block: Block) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The lines of the report and the tensors to write of a block's quantized weights."""
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for item, work in zip(plan.of_block(index), block.weights.values(), strict=True):
        assert item.scheme is not None and work.quantized is not None
        rows.append(steps.row(work) | {"scheme": asdict(item.scheme), "bytes": item.after})
        packed = formats.of(item.scheme).pack(work.quantized)
        tensors |= {f"{item.name}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}
    return rows, tensors


def copy_rest(plan: Plan, sink: Sink, watch: Watch) -> None:
    """Write everything that belongs to no block, as it is, in shards of up to 256 MiB."""
    units = rest(plan)
    watch.stage("Copying", len(units))
    for unit, names in units.items():
        if unit not in sink.done:
            tensors = {name: plan.source.read(name) for name in names}
            for name, tensor in tensors.items():
                check_finite(tensor, name, plan.source.info(name).file)
            sink.commit(unit, tensors, {})
        watch.step(unit)


def output_signature(hidden: Tensor) -> list[float]:
    """A block's output to be known again by: its norm, and values at places drawn by a fixed seed."""
    flat = hidden.flatten()
    places = torch.randint(flat.numel(), (SIGNATURE_VALUES,), generator=torch.Generator().manual_seed(0))
    return [float(torch.linalg.vector_norm(flat.float())), *flat[places].float().tolist()]


def check_signature(payload: Mapping[str, Any], hidden: Tensor, name: str) -> None:
    """Raise LlmqError when a block read back gives another output than it gave in memory."""
    then, now = torch.tensor(payload["signature"]), torch.tensor(output_signature(hidden))
    apart = float((then - now)[1:].norm() / then[1:].norm().clamp_min(1e-30))
    apart = max(apart, abs(float(now[0] / then[0].clamp_min(1e-30)) - 1))
    if not apart <= SIGNATURE_TOLERANCE:
        raise LlmqError(
            f"{name}: read back from disk it gives another output than in memory (relative difference {apart:.1e}); "
            "the disk or memory is faulty, another program changed the folder, or the run began on another machine: "
            "delete the folder and run again"
        )


def verify(plan: Plan, sink: Sink, recording: Recording, device: torch.device, watch: Watch) -> None:
    """Reopen every block that was written and compare its output on the first batch with the one it had in memory."""
    hidden = recording.hidden[:1]
    watch.stage("Verifying", len(plan.structure.blocks))
    for index in range(len(plan.structure.blocks)):
        hidden = replay(plan, sink, index, hidden, [recording.calls[0][index]], device)
        watch.step("")
