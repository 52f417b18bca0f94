"""Fill a block with what is written of it, and pack what is to be written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.block.block import Block, WeightState
from llmq.checkpoint.sink import Sink
from llmq.discovery.experts import Expert
from llmq.discovery.parameters import assign
from llmq.discovery.view import View
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.planning.memory import REST_BYTES
from llmq.planning.plan import BlockPlan, Plan
from llmq.planning.weights import WeightPlan
from llmq.report.rows import weight_row
from llmq.streaming.block_reader import BlockReader, states_of


@dataclass(frozen=True)
class BlockIO(BlockReader):
    """A reader that also fills blocks from the sink's written tensors, and says what is to be written."""

    sink: Sink

    def _written(self, tensor: str) -> Tensor:
        """A tensor of the output folder, a float one in the model's dtype."""
        value = self.sink.read(tensor)
        return value.to(self.plan.dtype) if value.is_floating_point() else value

    def restore_expert(self, block: BlockPlan, expert: int) -> tuple[Expert, list[WeightState]]:
        """One of a block's experts, read back from the output folder, and its weights."""
        assert block.experts is not None
        info, planned = block.experts.info, block.experts.weights[expert]
        entries = {}
        for name in info.parameters:
            if name in info.stacks:
                shape = self._shape(f"{block.name}.{info.module}.{name}")[1:]
                entries[name] = torch.empty(shape, dtype=self.plan.dtype)
            elif block.unit in self.sink.done:
                entries[name] = self._entry(block, name, expert, self._written)
            else:
                # Not written before the block is finished, and then as it is here.
                entries[name] = self._entry(block, name, expert, self._checked, self._checked_entry)
        module = self._expert(block, entries)
        states = states_of(module, planned)
        for state, weight in zip(states, planned.values(), strict=True):
            state.quantized = self._read(weight)
            state.input_scale = getattr(state.quantized, "input_scale", None)
            state.view.set(module, state.result().to(self.device))
        return module, states

    def restore(self, block: BlockPlan) -> list[WeightState]:
        """Fill the block with its written tensors, read back from the output folder; quantized ones are dequantized.

        Returns its quantized weights, which say how their inputs are rounded.
        """
        dtype = self.plan.dtype
        quantized = {name: self._read(weight) for name, weight in block.weights.items()}
        for name in block.tensors:
            if name in block.streamed:
                continue
            full = f"{block.name}.{name}"
            if block.parts is not None and name in block.parts.parameters:
                value = torch.empty(self._shape(full), dtype=dtype)
            elif name in quantized:
                value = quantized[name].dequantize(dtype)
            elif name in block.joined:
                value = self._written(block.joined[name])
            else:
                value = self.plan.links.fill(full, self._shape(full), self._written)
            assign(block.module, name, value.to(self.device))
        self._moved(block)
        states = states_of(block.module, block.weights)
        for state in states:
            state.quantized = quantized[state.view.name]
            state.input_scale = getattr(state.quantized, "input_scale", None)
        return states if block.parts is None else states + self.put_parts(block)

    def put_parts(self, block: BlockPlan) -> list[WeightState]:
        """Set the experts that are parts of a filled block to those read back from the output folder; returns them."""
        assert block.parts is not None
        states = states_of(block.module, block.parts.weights)
        for state, weight in zip(states, block.parts.weights.values(), strict=True):
            written = self._read(weight)
            state.view.set(block.module, written.dequantize(state.dtype).to(self.device))
            state.input_scale = getattr(written, "input_scale", None)
        return states

    def round_outside(self, weight: WeightPlan) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
        """A weight outside the blocks, read and quantized without calibration: its row, its tensors, and its values."""
        assert weight.scheme is not None
        plan, value = self.plan, self._checked(weight.tensor).to(self.device)
        state = WeightState(weight.name, View("weight"), weight.scheme, value, value.dtype, 0)
        began = time.perf_counter()
        try:
            quantized = plan.pipeline.data_free.quantize(value, weight.scheme, {}, plan.dtype)
        except LlmqError as problem:
            raise LlmqError(f"{weight.tensor}: {problem}") from problem
        state.quantized, state.seconds = quantized, time.perf_counter() - began
        row = weight_row(state, None, weight.after)
        if plan.pipeline.quantizer.quantize_needs:
            row = replace(row, notes=(*row.notes, f"no calibration: {plan.pipeline.how_without}"))
        return asdict(row), _packed(weight, quantized), state.result().cpu()

    def read_back(self, weight: WeightPlan) -> Tensor:
        """The values of a written quantized weight, in the model's dtype."""
        return self._read(weight).dequantize(self.plan.dtype)

    def _read(self, weight: WeightPlan) -> Quantized:
        """A written quantized weight."""
        assert weight.scheme is not None
        kind = formats.of(weight.scheme)
        suffixes = kind.spec(weight.shape, weight.scheme, self.plan.dtype)
        stored = {suffix: self.sink.read(f"{weight.name}.{suffix}") for suffix in suffixes}
        return kind.unpack(stored, weight.scheme)

    def untouched(self, block: BlockPlan, changed: set[str]) -> dict[str, Tensor]:
        """The block's unquantized tensors, byte for byte from the checkpoint, except those that an earlier block
        shares.

        Parameters in `changed` have the block's values, in the checkpoint's dtype.
        """
        experts = [] if block.experts is None else block.experts.weights
        parts = {} if block.parts is None else block.parts.weights
        elsewhere = {weight.tensor for mine in (block.weights, parts, *experts) for weight in mine.values()}
        # A stack of which each expert is written by its own name.
        stacks = set() if block.parts is None else block.parts.parameters
        if block.experts is not None:
            stacks |= {f"{block.experts.info.module}.{name}" for name in block.experts.info.stacks}
        elsewhere |= {name for stack in stacks for name in block.tensors.get(stack, ())}
        for earlier in self.plan.blocks[: block.index]:
            elsewhere |= earlier.stored
        read = self.plan.source.read
        apart = (found for parameter, found in block.tensors.items() if parameter not in block.joined)
        names = dict.fromkeys(name for found in apart for name in found if name not in elsewhere)
        tensors = {name: read(name) for name in names}
        for parameter, name in block.joined.items():
            full = f"{block.name}.{parameter}"
            tensors[name] = self.plan.links.fill(full, self._shape(full), read)
        for parameter in changed:
            (tensor,) = block.tensors[parameter]
            tensors[tensor] = block.module.get_parameter(parameter).detach().to("cpu", tensors[tensor].dtype)
        return tensors


def pack_weights(
    planned: BlockPlan, block: Block, weights: Mapping[str, WeightPlan] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A block's quantized weights: their rows of the report, and the tensors to write. Their codes are let go.

    weights: those of an expert, if `block` is one of the planned block's experts.
    """
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for name, weight in (planned.weights if weights is None else weights).items():
        state = block.weights[name]
        assert weight.scheme is not None and state.quantized is not None
        rows.append(asdict(weight_row(state, planned.index, weight.after, weight.expert)))
        tensors |= _packed(weight, state.quantized)
        state.quantized = None
    return rows, tensors


def _packed(weight: WeightPlan, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors that store a weight, by their names."""
    assert weight.scheme is not None
    packed = formats.of(weight.scheme).pack(quantized)
    return {f"{weight.name}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}


def rest(plan: Plan) -> dict[str, list[str]]:
    """The checkpoint's tensors outside the blocks that are written, in units of up to 256 MiB, or of one larger one."""
    inside = {tensor for block in plan.blocks for tensor in block.stored} | plan.left_out
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
