"""The quantized model while its scales and norms are trained: one block in memory, forwards and backwards.

Forwards, every block's input is kept for a few batches. Backwards, the last block first: a block is filled again, run
again from its input, and the gradient of its output is handed back through it. So the memory is that of one block, of
its activations for one batch, and of a few batches' states; and a step costs about four passes. Each batch's gradients
are contracted to those of what is trained, and added in the order of the batches: of several ranks, each runs some of
the batches, and all of them make the same step.

Two things are taken as they are: what blocks hand to later ones beside hidden states has values, but no gradient; and
where inputs are rounded, gradients ignore that (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import formats, ranks
from llmq.block.siblings import siblings
from llmq.block.state import WeightState, rounded_inputs
from llmq.discovery.calls import Call, Recording, States, of_length
from llmq.discovery.parameters import assign, empty
from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.methods.distill import KEPT, read_bytes
from llmq.numerics.scale_factors import factor_gradient, scaled_by
from llmq.training import state
from llmq.training.lent import Batches
from llmq.training.tail import TrainedTail
from llmq.training.trained import IO, Norm, Planned, block_gains, norm_of
from llmq.watch import Watch


@dataclass
class Opened:
    """What is read of a block: its weights, and the values of its other parameters, by name."""

    weights: list[tuple[WeightState, QuantizedWeight]]
    rest: dict[str, Tensor]

    @property
    def states(self) -> list[WeightState]:
        """The weights, which say how inputs are rounded."""
        return [weight for weight, _ in self.weights]


@dataclass
class StreamedStudent:
    """See `llmq.methods.base.Student`. Made by `open_student`, within whose context it works.

    data: what this rank has of the batches; folder: where the state of training is kept; of: what it is the state of.
    """

    io: IO
    data: Batches
    tail: TrainedTail
    folder: Path
    of: str
    watch: Watch
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    _kept: dict[int, Opened] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """See `Student.batches`."""
        return len(self.tail.ids)

    @property
    def windows(self) -> int:
        """See `Student.windows`."""
        return int(self.tail.ids[0].shape[0])

    def progress(self, text: str) -> None:
        """See `Student.progress`."""
        self.watch.step(text)

    @property
    def saved(self) -> bool:
        """Whether there is a state of training that can be read, of these weights: rank 0 has looked."""
        try:
            found = ranks.first() and (state.about(self.folder) or {}).get("of") == self.of
        except LlmqError:
            found = False
        return ranks.tell(found)

    def save(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> None:
        """See `Student.save`. Rank 0 writes."""
        with ranks.failing_together():
            if ranks.first():
                self.folder.mkdir(exist_ok=True)
                state.save(self.folder, values, optimizer, {**about, "of": self.of})

    def load(self, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """See `Student.load`: None also for the state of other weights. Each rank reads it."""
        if not self.saved:
            return None
        with ranks.failing_together():
            try:
                about = state.load(self.folder, values, optimizer) or {}
            except LlmqError as problem:
                told = f"the state of training in {self.folder} is damaged: delete that folder and run the same command"
                raise LlmqError(f"{told} again") from problem
        return {key: value for key, value in about.items() if key != "of"}

    def loss(self, batches: Sequence[int]) -> float:
        """See `Student.loss`."""
        with self.data.shared(batches) as mine:
            states = self.forward(mine)
            found = {b: self.tail.divergence(b, one.hidden) for b, one in zip(mine, states, strict=True)}
        return self._mean(found, batches)

    def descend(self, batches: Sequence[int], step: Callable[[], object]) -> float:
        """See `Student.descend`."""
        inputs: list[list[States]] = []
        divergences: dict[int, float] = {}
        gains: dict[int, dict[str, Tensor]] = {}
        slopes = []
        with self.data.shared(batches) as mine:
            for batch, one in zip(mine, self.forward(mine, inputs), strict=True):
                divergences[batch], slope, gains[batch] = self.tail.slope(batch, one.hidden)
                slopes.append(slope)
            self._collect([name for name in self.norms if name in self.tail.found.gains], gains, batches)
            step()
            for block, entered in zip(reversed(self.io.plan.blocks), reversed(inputs), strict=True):
                found, slopes = self._backward(block, mine, entered, slopes)
                self._collect([name for name in self.parameters if name.startswith(f"{block.name}.")], found, batches)
                step()
        return self._mean(divergences, batches)

    def forward(self, batches: Sequence[int], inputs: list[list[States]] | None = None) -> list[States]:
        """The last block's output for some batches; inputs: gets what enters each block."""
        states = [self.data.first[b] for b in batches]
        for block in self.io.plan.blocks:
            if inputs is not None:
                inputs.append(states)
            states = self.step(block, states, batches)
        return states

    def step(self, block: Planned, states: list[States], batches: Sequence[int]) -> list[States]:
        """What a block hands to later ones for some batches."""
        if not batches:
            return []
        found, module = [], block.module
        with rounded_inputs(module, self.fill(block).states), torch.no_grad(), self._named():
            for batch, one in zip(batches, states, strict=True):
                found.append(self._call(block, batch, one).step(module, one.hidden, self.io.device))
        empty_all(module)
        return found

    def tensors(self, block: Planned) -> dict[str, Tensor]:
        """The tensors that store what is trained of a block."""
        found: dict[str, Tensor] = {}
        opened = {weight.name: q for weight, q in self._open(block).weights}
        for states in siblings(weight for weight, _ in self._open(block).weights):
            rounding, dtype = rounding_of(states[0].scheme.rules), self.io.plan.dtype
            scaled = [self._scaled(f"{block.name}.{one.parameter}", opened[one.name]) for one in states]
            joined = rounding.join([rounding.finish(q, dtype) for q in scaled], dtype)
            for one, stored in zip(states, joined, strict=True):
                packed = formats.of(one.scheme).pack(stored)
                found |= {f"{one.name}.{suffix}": tensor for suffix, tensor in packed.items()}
        for name, norm in self.norms.items():
            if name.startswith(f"{block.name}.") and name in self.parameters:
                found[norm.tensor] = norm.moved(self.parameters[name].detach())
        return found

    def settle(self, block: Planned) -> None:
        """Take a block as it is written: what was trained of it is there already."""
        for name in [name for name in self.parameters if name.startswith(f"{block.name}.")]:
            del self.parameters[name]

    def _backward(
        self, block: Planned, batches: Sequence[int], entered: list[States], slopes: list[Tensor]
    ) -> tuple[dict[int, dict[str, Tensor]], list[Tensor]]:
        """For each batch, given the slope of its sum over tokens with respect to a block's output: the slopes with
        respect to what is trained of the block, on the CPU, and to its input."""
        found: dict[int, dict[str, Tensor]] = {}
        handed: list[Tensor] = []
        if not batches:
            return found, handed
        opened, module = self.fill(block), block.module
        quantized = {weight.parameter: ranks.moved(q, self.io.device) for weight, q in opened.weights}
        names = [name for name, _ in module.named_parameters() if f"{block.name}.{name}" in self.parameters]
        for name in names:
            module.get_parameter(name).requires_grad_(True)
        with rounded_inputs(module, opened.states, straight_through=True), torch.enable_grad(), self._named():
            for batch, one, slope in zip(batches, entered, slopes, strict=True):
                hidden = one.hidden.to(self.io.device).detach().requires_grad_(True)
                output = self._call(block, batch, one).run(module, hidden)
                torch.autograd.backward([output], [slope.to(output)])
                assert hidden.grad is not None
                handed.append(hidden.grad.to(one.hidden))
                del output, hidden
                found[batch] = {}
                for name in names:
                    parameter = module.get_parameter(name)
                    if parameter.grad is not None:
                        found[batch][f"{block.name}.{name}"] = contracted(parameter.grad, quantized.get(name))
                        parameter.grad = None
        empty_all(module)
        return found, handed

    def _collect(self, names: list[str], found: Mapping[int, Mapping[str, Tensor]], batches: Sequence[int]) -> None:
        """Set the gradients of some trained parameters, from the slopes of each batch's sum over its tokens, of which
        this rank has some. Slopes of a batch are put one after the other, and so added at once."""
        if not names:
            return
        dtype = torch.promote_types(self.io.plan.dtype, torch.float32)
        sizes = [self.parameters[name].numel() for name in names]

        def of(name: str, slopes: Mapping[str, Tensor]) -> Tensor:
            # What a batch does not use has no slope.
            return slopes[name].to(dtype) if name in slopes else torch.zeros_like(self.parameters[name], dtype=dtype)

        parts = {batch: torch.cat([of(name, slopes).flatten() for name in names]) for batch, slopes in found.items()}
        whole = ranks.total(torch.empty(sum(sizes), dtype=dtype), parts, batches, self.data.runners(batches))
        for name, slope in zip(names, torch.split(whole, sizes), strict=True):
            scale = (self.norms[name].size if name in self.norms else 1.0) / self._tokens(batches)
            parameter = self.parameters[name]
            parameter.grad = slope.mul_(scale).to(parameter.dtype).view_as(parameter)

    def fill(self, block: Planned) -> Opened:
        """Fill a block with what is written of it, its scales and norms as they are trained."""
        opened, plan = self._open(block), self.io.plan
        for name, value in opened.rest.items():
            full = f"{block.name}.{name}"
            if full in self.norms and full in self.parameters:
                value = self.norms[full].moved(self.parameters[full].detach()).to(plan.dtype)
            assign(block.module, name, value.to(self.io.device))
        for weight, q in opened.weights:
            value = self.value(self._scaled(f"{block.name}.{weight.parameter}", q))
            assign(block.module, weight.parameter, value.to(self.io.device))
        return opened

    def value(self, q: QuantizedWeight) -> Tensor:
        """A weight [out, in], as loaders compute it."""
        return q.dequantize(self.io.plan.dtype)

    def _scaled(self, name: str, q: QuantizedWeight) -> QuantizedWeight:
        return scaled_by(q, self.parameters[name].detach()) if name in self.parameters else q

    def _open(self, block: Planned) -> Opened:
        """What is read of a block; it is kept if all blocks may be."""
        if block.index in self._kept:
            return self._kept[block.index]
        weights = []
        for weight in self.io.restore(block):
            assert weight.quantized is not None
            q = rounding_of(weight.scheme.rules).reopen(weight.quantized)
            weights.append((replace(weight, value=torch.empty(0), quantized=None), q))
        names = {weight.parameter for weight, _ in weights}
        rest = {name: p.detach().cpu() for name, p in block.module.named_parameters() if name not in names}
        opened = Opened(weights, rest)
        if read_bytes(self.io.plan.blocks, self.io.plan.dtype) <= KEPT:
            self._kept[block.index] = opened
        return opened

    def _call(self, block: Planned, batch: int, states: States) -> Call:
        return self.data.calls[batch][block.index].given(states.handed)

    def _mean(self, found: Mapping[int, float], batches: Sequence[int]) -> float:
        """The loss over some batches, from their sums over tokens, of which this rank has some."""
        every = {batch: loss for one in ranks.everyone(dict(found)) for batch, loss in one.items()}
        return sum(every[batch] for batch in batches) / self._tokens(batches)

    def _tokens(self, batches: Sequence[int]) -> int:
        return sum(self.tail.ids[b].numel() for b in batches)

    def _named(self) -> Any:
        return of_length("a block", self.tail.ids[0].shape[1])


def contracted(slope: Tensor, q: QuantizedWeight | None) -> Tensor:
    """The slope with respect to what is trained of a parameter, on the CPU, from that with respect to the parameter.

    q: its codes and scales, if it is quantized: then that is its factors.
    """
    return slope.cpu() if q is None else factor_gradient(q, slope).cpu()


def empty_all(module: nn.Module) -> None:
    """Free a module's memory."""
    for name, _ in list(module.named_parameters()):
        empty(module, name)


@contextmanager
def open_student(
    io: IO, recording: Recording, first: list[States], teacher: list[Tensor] | None, folder: Path, of: str, watch: Watch
) -> Iterator[StreamedStudent]:
    """The written model, to be trained within the context. teacher: the unquantized model's last hidden states, batch
    by batch, if there will be a loss. Of several ranks, each gives what it has of its own batches.

    Raises LlmqError if the model returns no logits.
    """
    plan = io.plan
    data = Batches.dealt(len(torch.split(plan.ids, plan.batch)), first, recording, teacher)
    with TrainedTail.opened(io, None if teacher is None else data.teacher) as tail:
        made = StreamedStudent(io, data, tail, folder, of, watch)
        with ranks.failing_together():
            # Rank 0 has a batch, and others may have none.
            gains = list(block_gains(io, recording)) if ranks.first() else []
        for index, names in enumerate(ranks.tell(gains)):
            block = plan.blocks[index]
            for weight in block.weights.values():
                rows, width = weight.shape
                groups = 1 if weight.scheme.group_size is None else width // weight.scheme.group_size
                made.parameters[f"{block.name}.{weight.view.name}"] = nn.Parameter(torch.ones(rows, groups))
            for name in names:
                if (norm := norm_of(io, f"{block.name}.{name}", block.unit)) is not None:
                    made.norms[f"{block.name}.{name}"] = norm
        for name in sorted(tail.found.gains):
            if (norm := norm_of(io, name, None)) is not None:
                made.norms[name] = norm
        made.parameters |= {name: nn.Parameter(torch.zeros(prod(n.value.shape))) for name, n in made.norms.items()}
        tail.norms, tail.parameters = made.norms, made.parameters
        yield made
