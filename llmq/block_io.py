"""Load a block's weights from the checkpoint or the output folder, and free them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq import formats
from llmq.block.block import Block, WeightState
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import check_finite
from llmq.discovery.calls import Call
from llmq.discovery.parameters import assign, empty
from llmq.errors import LlmqError
from llmq.grids.base import Quantized
from llmq.planning.plan import BlockPlan, Plan

REST_BYTES = 2**28


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
        source, tensor = self.plan.source, self.plan.links.source.get(name)
        if tensor is None:
            raise LlmqError(f"{source.folder}: the checkpoint has no tensor for {name}")
        value = source.read(tensor)
        if value.is_floating_point():
            value = value.to(self.plan.dtype)
            check_finite(value, tensor, source.info(tensor).file)
        assign(self.plan.model, name, value.to(device or self.device))

    def fill(self, block: BlockPlan) -> nn.Module:
        """The block with its weights read from the checkpoint."""
        parameters = [name for name, _ in block.module.named_parameters()]
        for name in [*parameters, *(block.tensors.keys() - set(parameters))]:
            self.load(f"{block.name}.{name}")
        return block.module.to(self.device)

    def open(self, block: BlockPlan, inputs: list[Tensor], calls: list[Call]) -> Block:
        """The block with its weights read from the checkpoint, as a `Block` for methods."""
        module = self.fill(block)
        return Block(
            module,
            _states(block),
            inputs,
            calls,
            pairs=block.pairs,
            scale_dtype=self.plan.dtype,
            device=self.device,
        )

    def restore(self, block: BlockPlan) -> list[WeightState]:
        """Fill the block with its written tensors, read back from the output folder; quantized ones are dequantized.

        Returns its quantized weights, which say how their inputs are rounded.
        """
        dtype = self.plan.dtype
        quantized = {name: self._read(block, name) for name in block.weights}
        for name, tensor in block.tensors.items():
            value = quantized[name].dequantize(dtype) if name in quantized else self.sink.read(tensor)
            value = value.to(dtype) if value.is_floating_point() else value
            assign(block.module, name, value.to(self.device))
        block.module.to(self.device)
        states = _states(block)
        for state in states:
            state.quantized = quantized[state.view.name]
            state.input_scale = getattr(state.quantized, "input_scale", None)
        return states

    def _read(self, block: BlockPlan, name: str) -> Quantized:
        """A written quantized weight."""
        weight = block.weights[name]
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
        elsewhere = {weight.tensor for weight in block.weights.values()}
        for earlier in self.plan.blocks[: block.index]:
            elsewhere |= set(earlier.tensors.values())
        tensors = {name: self.plan.source.read(name) for name in block.tensors.values() if name not in elsewhere}
        for parameter in changed:
            tensor = block.tensors[parameter]
            tensors[tensor] = block.module.get_parameter(parameter).detach().to("cpu", tensors[tensor].dtype)
        return tensors


def discard(block: nn.Module) -> None:
    """Free the block's memory."""
    for name, _ in list(block.named_parameters()):
        empty(block, name)


def rest(plan: Plan) -> dict[str, list[str]]:
    """The checkpoint's tensors outside the blocks that are written, in units of up to 256 MiB, or of one larger one."""
    inside = {tensor for block in plan.blocks for tensor in block.tensors.values()} | plan.left_out
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


def _states(block: BlockPlan) -> list[WeightState]:
    """The initial states of a filled block's weights."""
    states = []
    for weight in block.weights.values():
        assert weight.view is not None and weight.scheme is not None
        value = weight.view.get(block.module)
        states.append(WeightState(weight.name, weight.view, weight.scheme, value, value.dtype, weight.input_id))
    return states
