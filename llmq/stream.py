"""THE loop: one block in memory at a time, read from the checkpoint, quantized, on disk before the next is read.

Read this file first. `run` is the data flow of docs/design.md; everything else here is a step of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq import methods
from llmq.blocks import discard, fill, load, release, rest, restore, untouched
from llmq.budget import before_blocks
from llmq.capture import Statistic, collect
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors
from llmq.parameters import assign, empty
from llmq.planning import Item, Plan
from llmq.record import Call, Recording, record
from llmq.sink import Sink
from llmq.source import check_finite

CHUNK = 1 << 21
PROBE_VALUES = 256
PROBE_TOLERANCE = 1e-3


class Watch(Protocol):
    """Is told how far the run has come; the command line draws a progress bar from it."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, text: str) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something the user should know happened."""


def run(plan: Plan, sink: Sink, device: torch.device, watch: Watch) -> None:
    """Quantize every block of the plan into the sink, resuming where it stopped, then verify what was written.

    Raises LlmqError naming the weight or file; finished blocks are kept, and the same call goes on from there.
    """
    copy_rest(plan, sink, watch)
    recording = skeleton(plan, device, watch)
    hidden, recording.hidden = recording.hidden, recording.hidden[:1]
    units = [f"block {i}" for i in range(len(plan.structure.blocks))]
    todo = [i for i, unit in enumerate(units) if unit not in sink.done]
    watch.stage("Quantizing", len(units))
    for index in range(todo[0] if todo else 0):
        hidden = replay(plan, sink, index, hidden, [calls[index] for calls in recording.calls], device)
        watch.step(f"{units[index]} was already done")
    for index in todo:
        hidden = quantize_block(plan, sink, index, hidden, [calls[index] for calls in recording.calls], device)
        release()
        watch.step(f"{units[index]}: output error {sink.done[units[index]]['error']:.2e}")
    del hidden
    verify(plan, sink, recording, device, watch)


def quantize_block(
    plan: Plan, sink: Sink, index: int, hidden: list[Tensor], calls: list[Call], device: torch.device
) -> list[Tensor]:
    """Read, observe, quantize, run again and commit one block; returns its quantized output, the next one's input."""
    began = time.perf_counter()
    block = fill(plan, index, device)
    target, statistics = observe(plan, index, block, hidden, calls, device)
    tensors, rows = quantize_weights(plan, index, statistics)
    tensors |= untouched(plan, index)
    output = forward(block, hidden, calls, device)
    check_output(plan, index, output, "after quantization, though it was before: keep its worst weights with --keep")
    payload = {"weights": rows, "error": relative_error(output, target), "probe": probe(output[0])}
    payload["seconds"] = round(time.perf_counter() - began, 3)
    discard(block)
    sink.commit(f"block {index}", tensors, payload)
    return output


def replay(
    plan: Plan, sink: Sink, index: int, hidden: list[Tensor], calls: list[Call], device: torch.device
) -> list[Tensor]:
    """The output of a block as it was written, compared with the one it had in memory."""
    block = restore(plan, sink, index, device)
    output = forward(block, hidden, calls, device)
    check_probe(sink.done[f"block {index}"], output[0], plan.structure.blocks[index].name)
    discard(block)
    release()
    return output


def skeleton(plan: Plan, device: torch.device, watch: Watch) -> Recording:
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
    with torch.inference_mode():
        return [call.run(block, h.to(device)).to(h) for h, call in zip(hidden, calls, strict=True)]


def observe(
    plan: Plan, index: int, block: nn.Module, hidden: list[Tensor], calls: list[Call], device: torch.device
) -> tuple[list[Tensor], dict[int, dict[type[Statistic], Statistic]]]:
    """One pass of the unquantized block: its outputs, and the statistics of each distinct weight input."""
    needs = methods.needs(plan.recipe)
    statistics: dict[int, dict[type[Statistic], Statistic]] = {}
    fed: dict[nn.Module, list[Statistic]] = {}
    for item in plan.of_block(index):
        if item.shares not in statistics:
            statistics[item.shares] = {need: need(item.shape[1], device) for need in needs}
            fed[plan.model.get_submodule(item.module)] = list(statistics[item.shares].values())
    with collect(fed):
        target = forward(block, hidden, calls, device)
    check_output(plan, index, target, "before any quantization: it overflows its dtype, or its weights are damaged")
    return target, statistics


def check_output(plan: Plan, index: int, output: list[Tensor], when: str) -> None:
    """Raise LlmqError where a block's output is not finite."""
    if not all(bool(torch.isfinite(t).all()) for t in output):
        raise LlmqError(f"{plan.structure.blocks[index].name}: its output is not finite {when}")


def quantize_weights(
    plan: Plan, index: int, statistics: dict[int, dict[type[Statistic], Statistic]]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Quantize a block's weights in place: the tensors to write, the lines of the report. Statistics go once used."""
    items = plan.of_block(index)
    last = {item.shares: item for item in items}
    tensors: dict[str, Tensor] = {}
    rows = []
    for item in items:
        packed, row = quantize_weight(plan, item, statistics[item.shares])
        tensors |= packed
        rows.append(row)
        if last[item.shares] is item:
            del statistics[item.shares]
    return tensors, rows


def quantize_weight(
    plan: Plan, item: Item, statistics: Mapping[type[Statistic], Statistic]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize one weight in place: the tensors to write and its line of the report."""
    began = time.perf_counter()
    assert item.scheme is not None
    module = plan.model.get_submodule(item.module)
    weight = module.get_parameter("weight").detach()
    try:
        quantized = methods.quantize(plan.recipe, weight, item.scheme, statistics)
    except LlmqError as problem:
        raise LlmqError(f"{item.tensor}: {problem}") from problem
    value = quantized.dequantize(plan.dtype)
    error = relative_error([value], [weight])
    assign(plan.model, f"{item.module}.weight", value)
    packed = compressed_tensors.pack(quantized)
    row = {
        "name": item.name,
        "shape": list(item.shape),
        "scheme": asdict(item.scheme),
        "bytes": item.after,
        "error": error,
        "notes": list(quantized.notes),
        "seconds": round(time.perf_counter() - began, 3),
    }
    return {f"{item.name}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}, row


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


def relative_error(values: list[Tensor], targets: list[Tensor]) -> float:
    """‖values − targets‖ / ‖targets‖ over all of them, a few rows at a time."""
    apart = whole = 0.0
    for value, target in zip(values, targets, strict=True):
        for v, t in zip(torch.split(value.flatten(), CHUNK), torch.split(target.flatten(), CHUNK), strict=True):
            exact = t.float()
            apart += float(torch.linalg.vector_norm(v.float() - exact)) ** 2
            whole += float(torch.linalg.vector_norm(exact)) ** 2
    return math.sqrt(apart / whole) if whole else math.sqrt(apart)


def probe(hidden: Tensor) -> list[float]:
    """A block's output to be known again by: its norm, and values at places drawn by a fixed seed."""
    flat = hidden.flatten()
    places = torch.randint(flat.numel(), (PROBE_VALUES,), generator=torch.Generator().manual_seed(0))
    return [float(torch.linalg.vector_norm(flat.float())), *flat[places].float().tolist()]


def check_probe(payload: Mapping[str, Any], hidden: Tensor, name: str) -> None:
    """Raise LlmqError when a block read back gives another output than it gave in memory."""
    then, now = torch.tensor(payload["probe"]), torch.tensor(probe(hidden))
    apart = float((then - now)[1:].norm() / then[1:].norm().clamp_min(1e-30))
    apart = max(apart, abs(float(now[0] / then[0].clamp_min(1e-30)) - 1))
    if not apart <= PROBE_TOLERANCE:
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
