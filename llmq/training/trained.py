"""What of a written model can be trained beside its scales: the gains of its norms; and where they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.block.block import WeightState
from llmq.checkpoint.sink import Sink
from llmq.discovery.blocks import structure_key
from llmq.discovery.calls import Recording
from llmq.discovery.gains import gains
from llmq.discovery.names import Links
from llmq.discovery.parameters import shared_zeros
from llmq.methods import Pipeline


class Planned(Protocol):
    """A block of the plan. weights: the quantized ones, by parameter."""

    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def weights(self) -> Mapping[str, Any]: ...


class Planning(Protocol):
    """What is needed of a plan; outside: tensor → the quantized weight, outside the blocks."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def ids(self) -> Tensor: ...
    @property
    def batch(self) -> int: ...
    @property
    def blocks(self) -> Sequence[Any]: ...
    @property
    def links(self) -> Links: ...
    @property
    def outside(self) -> Mapping[str, Any]: ...
    @property
    def pipeline(self) -> Pipeline: ...


class Reads(Protocol):
    """What is needed of `llmq.streaming.block_reader.BlockReader`, which knows the plan and its checkpoint."""

    @property
    def plan(self) -> Planning: ...
    @property
    def device(self) -> torch.device: ...
    def load(self, name: str, device: torch.device | None = None) -> None:
        """Fill a parameter or buffer from the checkpoint."""


class IO(Reads, Protocol):
    """What is needed of `llmq.streaming.block_io.BlockIO`, which also knows what is written."""

    @property
    def sink(self) -> Sink: ...

    def restore(self, block: Any) -> list[WeightState]:
        """Fill a block with what is written of it; returns its quantized weights."""

    def read_back(self, weight: Any) -> Tensor:
        """The values of a written quantized weight outside the blocks."""


@dataclass
class Norm:
    """A trained gain: the tensor that stores it, its written value, and how much it moves per unit of its change."""

    tensor: str
    value: Tensor
    size: float

    def moved(self, change: Tensor) -> Tensor:
        """The gain after a relative change, in its stored dtype; it is not rounded if nothing changes."""
        if not bool(change.any()):
            return self.value
        wide = torch.promote_types(self.value.dtype, torch.float32)
        return (self.value.to(wide) + self.size * change).to(self.value.dtype)


def norm_of(io: IO, name: str, unit: str | None) -> Norm | None:
    """A gain by its name in the model, if one tensor is it and nothing else, written with this unit (None: any)."""
    source = io.plan.links.source
    tensor = source.get(name)
    if tensor is None or sum(other == tensor for other in source.values()) > 1:
        return None
    where = io.sink.unit_of(tensor)
    if where is None or (unit is not None and where != unit):
        return None
    value = io.sink.read(tensor)
    size = float(torch.linalg.vector_norm(value.float())) / math.sqrt(value.numel())
    # A gain of zeros is a norm's that multiplies by 1 + w, or one that nothing passes.
    return Norm(tensor, value, size or 1.0)


def block_gains(io: IO, recording: Recording) -> Iterator[list[str]]:
    """The gains of each block, by parameter: one block of each kind is run, with zeros for parameters."""
    known: dict[Any, list[str]] = {}
    for block, call in zip(io.plan.blocks, recording.sampled(), strict=True):
        key = structure_key(block.module, call, set())
        if key not in known:
            with shared_zeros(block.module, device=io.device):
                hidden = recording.hidden[0].to(io.device)
                known[key] = sorted(gains(block.module, lambda: call.result(block.module, hidden)))  # noqa: B023
        yield known[key]
