"""Read the blocks of a plan's model from its checkpoint, and free them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.block.block import Block, WeightState
from llmq.checkpoint.source import check_finite
from llmq.discovery.calls import Call
from llmq.discovery.experts import Expert
from llmq.discovery.parameters import assign, empty
from llmq.discovery.tail import Tail
from llmq.errors import LlmqError
from llmq.planning.plan import BlockPlan, Plan
from llmq.planning.weights import WeightPlan
from llmq.spill import Saving, keep


@dataclass(frozen=True)
class BlockReader:
    """Fills the blocks of a plan's model from its checkpoint.

    device: where blocks are loaded and run.
    """

    plan: Plan
    device: torch.device

    def load(self, name: str, device: torch.device | None = None) -> None:
        """Fill a parameter or buffer, given by its name in the model, from the checkpoint; check that it is finite."""
        if not self.plan.links.tensors(name):
            raise LlmqError(f"{self.plan.source.folder}: the checkpoint has no tensor for {name}")
        value = self.plan.links.fill(name, self._shape(name), self._checked)
        assign(self.plan.model, name, keep(value.to(device or self.device), Saving.PASSES))

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

    def _shape(self, name: str) -> tuple[int, ...]:
        """A parameter's or buffer's shape, by its name in the model."""
        owner, _, leaf = name.rpartition(".")
        return tuple(getattr(self.plan.model.get_submodule(owner), leaf).shape)

    def weight(self, weight: WeightPlan) -> Tensor:
        """A weight [out, in] of the plan, alone, read from the checkpoint."""
        plan = self.plan
        if weight.view is None or weight.block is None:
            return self._checked(weight.tensor).to(self.device)
        block = plan.blocks[weight.block]
        if block.experts is not None and weight.expert is not None:
            name = f"{block.name}.{block.experts.info.module}.{weight.view.parameter}"
            entry = plan.links.fill_entry(name, self._shape(name), weight.expert, self._checked, self._checked_entry)
            return weight.view.of(entry).to(self.device)
        name = f"{block.name}.{weight.view.parameter}"
        return weight.view.of(plan.links.fill(name, self._shape(name), self._checked)).to(self.device)

    def fill_expert(self, block: BlockPlan, expert: int) -> Expert:
        """One of a block's experts, read from the checkpoint."""
        assert block.experts is not None
        names = block.experts.info.parameters
        found = {name: self._entry(block, name, expert, self._checked, self._checked_entry) for name in names}
        return self._expert(block, found)

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

    def expect(self, block: BlockPlan) -> None:
        """Let the system read what `fill` will, while an earlier block is quantized."""
        for parameter, names in block.tensors.items():
            for name in names if parameter not in block.streamed else ():
                self.plan.source.expect(name)

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


def discard(block: nn.Module) -> None:
    """Free the block's memory."""
    for name, _ in list(block.named_parameters()):
        empty(block, name)


def states_of(module: nn.Module, weights: Mapping[str, WeightPlan]) -> list[WeightState]:
    """The initial states of a filled module's weights."""
    states = []
    for weight in weights.values():
        assert weight.view is not None and weight.scheme is not None
        value = weight.view.get(module)
        states.append(WeightState(weight.name, weight.view, weight.scheme, value, value.dtype, weight.input_id))
    return states
