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

from llmq import discover, methods
from llmq.budget import before_blocks
from llmq.capture import Statistic, collect
from llmq.discover import Call, Recording
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors
from llmq.planning import Item, Plan
from llmq.sink import Sink
from llmq.source import check_finite

REST_BYTES = 2**30
CHUNK = 1 << 21
PROBE_VALUES = 64
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
        block = restore(plan, sink, index, device)
        hidden = forward(block, hidden, [calls[index] for calls in recording.calls], device)
        check_probe(sink.done[units[index]], hidden[0], plan.structure.blocks[index].name)
        discard(block)
        watch.step(f"{units[index]} was already done")
    for index in todo:
        began = time.perf_counter()
        calls = [batch[index] for batch in recording.calls]
        block = fill(plan, index, device)
        target, statistics = observe(plan, index, block, hidden, calls, device)
        tensors: dict[str, Tensor] = {}
        rows = []
        for item in plan.of_block(index):
            packed, row = quantize_weight(plan, item, block, index, statistics)
            tensors |= packed
            rows.append(row)
        tensors |= untouched(plan, index)
        hidden = forward(block, hidden, calls, device)
        payload = {"weights": rows, "error": relative_error(hidden, target), "probe": probe(hidden[0])}
        payload["seconds"] = round(time.perf_counter() - began, 3)
        discard(block)
        sink.commit(units[index], tensors, payload)
        watch.step(f"{units[index]}: output error {payload['error']:.2e}")
    del hidden
    verify(plan, sink, recording, device, watch)


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
    recording = discover.record(model, blocks, _ticking(batches, watch))
    for name in needed:
        discover.empty(model, name)
    return recording


def _ticking(batches: list[Tensor], watch: Watch) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        watch.step("")


def load(plan: Plan, name: str, device: torch.device) -> None:
    """Fill one parameter or buffer of the model from the checkpoint, checked to be finite."""
    tensor = plan.links.source.get(name)
    if tensor is None:
        raise LlmqError(f"{plan.source.folder}: the checkpoint has no tensor for {name}")
    value = plan.source.read(tensor)
    if value.is_floating_point():
        check_finite(value, tensor, plan.source.info(tensor).file)
        value = value.to(plan.dtype)
    discover.assign(plan.model, name, value.to(device))


def members(plan: Plan, index: int) -> dict[str, str]:
    """Parameters and buffers of a block, by full name, with the checkpoint's name for each."""
    prefix = plan.structure.blocks[index].name + "."
    return {name: tensor for name, tensor in plan.links.source.items() if name.startswith(prefix)}


def fill(plan: Plan, index: int, device: torch.device) -> nn.Module:
    """The block with its weights read from the checkpoint."""
    name = plan.structure.blocks[index].name
    block = plan.model.get_submodule(name)
    for parameter, _ in block.named_parameters():
        load(plan, f"{name}.{parameter}", device)
    for buffer in members(plan, index).keys() - {f"{name}.{p}" for p, _ in block.named_parameters()}:
        load(plan, buffer, device)
    return block.to(device)


def restore(plan: Plan, sink: Sink, index: int, device: torch.device) -> nn.Module:
    """The block as it was written: every tensor read back from the output folder, quantized ones dequantized."""
    block = plan.model.get_submodule(plan.structure.blocks[index].name)
    chosen = {f"{item.module}.weight": item for item in plan.of_block(index)}
    for name, tensor in members(plan, index).items():
        item = chosen.get(name)
        if item is None or item.scheme is None:
            value = sink.read(tensor)
        else:
            suffixes = compressed_tensors.spec(item.shape, item.scheme, plan.dtype)
            stored = {suffix: sink.read(f"{item.name}.{suffix}") for suffix in suffixes}
            value = compressed_tensors.unpack(stored, item.scheme).dequantize(plan.dtype)
        discover.assign(plan.model, name, (value.to(plan.dtype) if value.is_floating_point() else value).to(device))
    return block.to(device)


def discard(block: nn.Module) -> None:
    """Give the block's memory back."""
    for name, _ in list(block.named_parameters()):
        discover.empty(block, name)


def forward(block: nn.Module, hidden: list[Tensor], calls: list[Call], device: torch.device) -> list[Tensor]:
    """The block's output for each batch, on the host in the model's dtype."""
    with torch.inference_mode():
        return [call.run(block, h.to(device)).to(h) for h, call in zip(hidden, calls, strict=True)]


def observe(
    plan: Plan, index: int, block: nn.Module, hidden: list[Tensor], calls: list[Call], device: torch.device
) -> tuple[list[Tensor], Mapping[int, dict[type[Statistic], Statistic]]]:
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
    if not all(bool(torch.isfinite(t).all()) for t in target):
        raise LlmqError(
            f"{plan.structure.blocks[index].name}: its output is not finite before any quantization; "
            f"the checkpoint overflows {plan.dtype}, or its weights are damaged"
        )
    return target, statistics


def quantize_weight(
    plan: Plan, item: Item, block: nn.Module, index: int, statistics: Mapping[int, Mapping[type[Statistic], Statistic]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize one weight in place: the tensors to write and its line of the report."""
    began = time.perf_counter()
    assert item.scheme is not None
    module = plan.model.get_submodule(item.module)
    weight = module.get_parameter("weight").detach()
    try:
        quantized = methods.quantize(plan.recipe, weight, item.scheme, statistics[item.shares])
    except LlmqError as problem:
        raise LlmqError(f"{item.tensor}: {problem}") from problem
    value = quantized.dequantize(plan.dtype)
    error = relative_error([value], [weight])
    discover.assign(plan.model, f"{item.module}.weight", value)
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


def untouched(plan: Plan, index: int) -> dict[str, Tensor]:
    """The block's other tensors, unless an earlier block shares them, byte for byte as the checkpoint has them."""
    chosen = {item.tensor for item in plan.of_block(index)}
    chosen |= {tensor for earlier in range(index) for tensor in members(plan, earlier).values()}
    return {t: plan.source.read(t) for t in members(plan, index).values() if t not in chosen}


def copy_rest(plan: Plan, sink: Sink, watch: Watch) -> None:
    """Write everything that belongs to no block, as it is, in shards of about 1 GiB."""
    units = rest(plan)
    watch.stage("Copying", len(units))
    for unit, names in units.items():
        if unit not in sink.done:
            sink.commit(unit, {name: plan.source.read(name) for name in names}, {})
        watch.step(unit)


def rest(plan: Plan) -> dict[str, list[str]]:
    """The checkpoint's tensors outside the blocks, in units of about 1 GiB."""
    inside = {t for i in range(len(plan.structure.blocks)) for t in members(plan, i).values()}
    units: dict[str, list[str]] = {}
    size = REST_BYTES
    for name in plan.source.names():
        if name not in inside:
            nbytes = plan.source.info(name).nbytes
            if size + nbytes > REST_BYTES:
                units[f"rest {len(units)}"] = []
                size = 0
            size += nbytes
            units[f"rest {len(units) - 1}"].append(name)
    return units


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
    """A few evenly spread values of a block's output, to know it again by."""
    flat = hidden.flatten()
    return [float(v) for v in flat[:: max(1, flat.numel() // PROBE_VALUES)][:PROBE_VALUES].float()]


def check_probe(payload: Mapping[str, Any], hidden: Tensor, name: str) -> None:
    """Raise LlmqError when a block read back gives another output than it gave in memory."""
    then, now = torch.tensor(payload["probe"]), torch.tensor(probe(hidden))
    apart = float((then - now).norm() / then.norm().clamp_min(1e-30))
    if not apart <= PROBE_TOLERANCE:
        raise LlmqError(
            f"{name}: read back from disk it gives another output than in memory (relative difference {apart:.1e}); "
            "the disk or memory is faulty, or another program changed the folder: delete it and run again"
        )


def verify(plan: Plan, sink: Sink, recording: Recording, device: torch.device, watch: Watch) -> None:
    """Reopen every block that was written and compare its output on the first batch with the one it had in memory."""
    hidden = recording.hidden[:1]
    watch.stage("Verifying", len(plan.structure.blocks))
    for index, info in enumerate(plan.structure.blocks):
        block = restore(plan, sink, index, device)
        hidden = forward(block, hidden, [recording.calls[0][index]], device)
        check_probe(sink.done[f"block {index}"], hidden[0], info.name)
        discard(block)
        watch.step("")
