"""Load a block's weights from the checkpoint or the output folder, and free them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq import formats
from llmq.block.block import Block, WeightState
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import check_finite
from llmq.discovery.calls import Call
from llmq.discovery.experts import Expert
from llmq.discovery.parameters import assign, empty
from llmq.discovery.tail import Tail
from llmq.discovery.view import View
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.planning.memory import REST_BYTES
from llmq.planning.plan import BlockPlan, Plan
from llmq.planning.weights import WeightPlan
from llmq.report.rows import weight_row


@dataclass(frozen=True)
class BlockIO:
    """Fills the blocks of a plan's model from its checkpoint or from the sink's written tensors.

    device: where blocks are loaded and run.
    """

    plan: Plan
    sink: Sink
    device: torch.device

    def load(self, name: str, device: torch.device | None = None) -> None:
        """Fill a parameter or buffer, given by its name in the model, from the checkpoint; check that it is finite."""
        if not self.plan.links.tensors(name):
            raise LlmqError(f"{self.plan.source.folder}: the checkpoint has no tensor for {name}")
        value = self.plan.links.fill(name, self._shape(name), self._checked)
        assign(self.plan.model, name, value.to(device or self.device))

    def _checked(self, tensor: str) -> Tensor:
        """A tensor of the checkpoint, a float one in the model's dtype. Raises LlmqError if it is not finite."""
        value = self.plan.source.read(tensor)
        if value.is_floating_point():
            value = value.to(self.plan.dtype)
            check_finite(value, tensor, self.plan.source.info(tensor).file)
        return value

    def _checked_entry(self, tensor: str, index: int) -> Tensor:
        """An entry along the first axis of a tensor of the checkpoint; as `_checked`."""
        value = self.plan.source.read_rows(tensor, index, index + 1)[0]
        if value.is_floating_point():
            value = value.to(self.plan.dtype)
            check_finite(value, f"{tensor}[{index}]", self.plan.source.info(tensor).file)
        return value

    def _written(self, tensor: str) -> Tensor:
        """A tensor of the output folder, a float one in the model's dtype."""
        value = self.sink.read(tensor)
        return value.to(self.plan.dtype) if value.is_floating_point() else value

    def _shape(self, name: str) -> tuple[int, ...]:
        """A parameter's or buffer's shape, by its name in the model."""
        owner, _, leaf = name.rpartition(".")
        return tuple(getattr(self.plan.model.get_submodule(owner), leaf).shape)

    def fill_expert(self, block: BlockPlan, expert: int) -> Expert:
        """One of a block's experts, read from the checkpoint."""
        assert block.experts is not None
        names = block.experts.info.parameters
        found = {name: self._entry(block, name, expert, self._checked, self._checked_entry) for name in names}
        return self._expert(block, found)

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

    def _entry(
        self,
        block: BlockPlan,
        name: str,
        expert: int,
        read: Callable[[str], Tensor],
        entry: Callable[[str, int], Tensor] | None = None,
    ) -> Tensor:
        """One expert's entry of a parameter of the experts' module, by its name in that."""
        assert block.experts is not None
        full = f"{block.name}.{block.experts.info.module}.{name}"
        return self.plan.links.fill_entry(full, self._shape(full), expert, read, entry)

    def _expert(self, block: BlockPlan, entries: Mapping[str, Tensor]) -> Expert:
        assert block.experts is not None
        info = block.experts.info
        moved = {name: value.to(self.device) for name, value in entries.items()}
        return Expert(block.module.get_submodule(info.module), info.call, moved)

    def fill(self, block: BlockPlan) -> nn.Module:
        """The block with its weights read from the checkpoint, but for those of streamed experts."""
        parameters = [name for name, _ in block.module.named_parameters() if name not in block.streamed]
        for name in [*parameters, *(block.tensors.keys() - set(parameters) - block.streamed)]:
            self.load(f"{block.name}.{name}")
        return self._moved(block)

    def _moved(self, block: BlockPlan) -> nn.Module:
        """The block, with the buffers that are in memory on the device."""
        for name, buffer in block.module.named_buffers():
            if not buffer.is_meta:
                assign(block.module, name, buffer.to(self.device))
        return block.module

    def open(
        self,
        block: BlockPlan,
        inputs: list[Tensor],
        calls: list[Call],
        unquantized: tuple[list[Tensor], list[Call]] | None = None,
    ) -> Block:
        """The block with its weights read from the checkpoint, as a `Block` for methods."""
        module = self.fill(block)
        return Block(
            module,
            states_of(module, block.weights),
            inputs,
            calls,
            pairs=block.pairs,
            scale_dtype=self.plan.dtype,
            device=self.device,
            unquantized=unquantized,
            partial=block.experts is not None,
        )

    @contextmanager
    def tail(self, block: BlockPlan) -> Iterator[Tail | None]:
        """Within the context, what follows the last block is in memory, in float32; None for other blocks."""
        tail = self.plan.tail if block.index == len(self.plan.blocks) - 1 else None
        names = () if tail is None else tail.parameters
        try:
            for name in names:
                self.load(name)
                assign(self.plan.model, name, self.plan.model.get_parameter(name).float())
            yield tail
        finally:
            for name in names:
                parameter = self.plan.model.get_parameter(name)
                assign(self.plan.model, name, torch.empty(parameter.shape, dtype=self.plan.dtype, device="meta"))

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
    """A block's quantized weights: their rows of the report, and the tensors to write.

    weights: those of an expert, if `block` is one of the planned block's experts.
    """
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for name, weight in (planned.weights if weights is None else weights).items():
        state = block.weights[name]
        assert weight.scheme is not None and state.quantized is not None
        rows.append(asdict(weight_row(state, planned.index, weight.after, weight.expert)))
        tensors |= _packed(weight, state.quantized)
    return rows, tensors


def _packed(weight: WeightPlan, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors that store a weight, by their names."""
    assert weight.scheme is not None
    packed = formats.of(weight.scheme).pack(quantized)
    return {f"{weight.name}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}


def discard(block: nn.Module) -> None:
    """Free the block's memory."""
    for name, _ in list(block.named_parameters()):
        empty(block, name)


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


def states_of(module: nn.Module, weights: Mapping[str, WeightPlan]) -> list[WeightState]:
    """The initial states of a filled module's weights."""
    states = []
    for weight in weights.values():
        assert weight.view is not None and weight.scheme is not None
        value = weight.view.get(module)
        states.append(WeightState(weight.name, weight.view, weight.scheme, value, value.dtype, weight.input_id))
    return states
