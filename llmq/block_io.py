"""A block's weights: from the checkpoint, from the output folder, and away again."""

from __future__ import annotations

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
from llmq.planning.plan import Plan

REST_BYTES = 2**28


def load(plan: Plan, name: str, device: torch.device) -> None:
    """Fill one parameter or buffer of the model from the checkpoint, checked to be finite."""
    tensor = plan.links.source.get(name)
    if tensor is None:
        raise LlmqError(f"{plan.source.folder}: the checkpoint has no tensor for {name}")
    value = plan.source.read(tensor)
    if value.is_floating_point():
        value = value.to(plan.dtype)
        check_finite(value, tensor, plan.source.info(tensor).file)
    assign(plan.model, name, value.to(device))


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


def restore(plan: Plan, sink: Sink, index: int, device: torch.device) -> list[WeightState]:
    """The block as it was written: every tensor read back from the output folder, quantized ones dequantized.

    Returns its quantized weights, which say how their inputs are rounded.
    """
    block = plan.model.get_submodule(plan.structure.blocks[index].name)
    prefix = plan.structure.blocks[index].name + "."
    chosen = {prefix + item.view.parameter: item for item in plan.of_block(index) if item.view is not None}
    quantized: dict[str, Quantized] = {}
    for name, tensor in members(plan, index).items():
        item = chosen.get(name)
        if item is None or item.scheme is None:
            value = sink.read(tensor)
        else:
            kind = formats.of(item.scheme)
            suffixes = kind.spec(item.shape, item.scheme, plan.dtype)
            stored = {suffix: sink.read(f"{item.name}.{suffix}") for suffix in suffixes}
            quantized[name] = kind.unpack(stored, item.scheme)
            value = quantized[name].dequantize(plan.dtype)
        assign(plan.model, name, (value.to(plan.dtype) if value.is_floating_point() else value).to(device))
    block.to(device)
    states = _states(plan, index)
    for state in states:
        state.quantized = quantized[prefix + state.view.parameter]
        state.input_scale = getattr(state.quantized, "input_scale", None)
    return states


def open_block(plan: Plan, index: int, inputs: list[Tensor], calls: list[Call], device: torch.device) -> Block:
    """The block with its weights read from the checkpoint, ready to be worked on."""
    fill(plan, index, device)
    name = plan.structure.blocks[index].name
    pairs = plan.pairs[name].pairs if name in plan.pairs else []
    module = plan.model.get_submodule(name)
    states = _states(plan, index)
    return Block(module, states, inputs, calls, pairs=pairs, scale_dtype=plan.dtype, device=device)


def _states(plan: Plan, index: int) -> list[WeightState]:
    block = plan.model.get_submodule(plan.structure.blocks[index].name)
    states = []
    for item in plan.of_block(index):
        assert item.view is not None and item.scheme is not None
        value = item.view.get(block)
        states.append(WeightState(item.name, item.view, item.scheme, value, value.dtype, item.input_id))
    return states


def discard(block: nn.Module) -> None:
    """Give the block's memory back."""
    for name, _ in list(block.named_parameters()):
        empty(block, name)


def untouched(plan: Plan, index: int, block: Block) -> dict[str, Tensor]:
    """The block's other tensors, unless an earlier block shares them: byte for byte as the checkpoint has them.

    Those that a transform changed have the checkpoint's dtype and the block's values.
    """
    prefix = plan.structure.blocks[index].name + "."
    chosen = {item.tensor for item in plan.of_block(index)}
    chosen |= {tensor for earlier in range(index) for tensor in members(plan, earlier).values()}
    tensors = {t: plan.source.read(t) for t in members(plan, index).values() if t not in chosen}
    for parameter in block.changed:
        tensor = plan.links.source[prefix + parameter]
        tensors[tensor] = block.module.get_parameter(parameter).detach().to("cpu", tensors[tensor].dtype)
    return tensors


def rest(plan: Plan) -> dict[str, list[str]]:
    """The checkpoint's tensors outside the blocks, in units of up to 256 MiB, or one tensor."""
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
