"""What follows the last block, in float32: the divergence of the logits of two sets of last hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.discovery.parameters import assign
from llmq.discovery.tail import Tail, find_tail
from llmq.errors import LlmqError
from llmq.streaming.block_reader import BlockReader
from llmq.training.tail import in_memory, logarithms


@dataclass
class Judge:
    """The tail of a model, with its parameters in memory. known: their values, by name."""

    reader: BlockReader
    tail: Tail
    known: dict[str, Tensor] = field(default_factory=dict)

    def divergence(
        self, base: Tensor, other: Tensor, shape: torch.Size, changed: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """KL(base ‖ other) of the logits of each token, in nats, float64 [tokens].

        base, other: the last block's output, any float dtype; shape: of the token ids, [batch, tokens]; changed:
        other values of some parameters of the tail, for `other`.
        """
        found, device = [], self.reader.device
        with torch.no_grad():
            for part in self.tail.pieces(base.shape):
                size = None if self.tail.apart else shape
                want, have = (
                    self._logarithms(states[:, part].to(device), size, values)
                    for states, values in ((base, {}), (other, changed or {}))
                )
                found.append((want.exp() * (want - have)).sum(-1, dtype=torch.float64).flatten().cpu())
        return torch.cat(found)

    def _logarithms(self, hidden: Tensor, shape: torch.Size | None, values: Mapping[str, Tensor]) -> Tensor:
        for name, value in values.items():
            assign(self.reader.plan.model, name, value)
        try:
            logits = self.tail.logits(hidden.to(self.reader.plan.dtype), shape)
            return logarithms(logits)
        finally:
            for name in values:
                assign(self.reader.plan.model, name, self.known[name])


@contextmanager
def judging(reader: BlockReader, hidden: Tensor, shape: torch.Size) -> Iterator[Judge]:
    """Within the context, what follows the last block is in memory.

    hidden: output of the last block for token ids of a shape, on which it is tried what logits depend on. Raises
    LlmqError if the model returns no logits, or they depend on anything but the last block's output.
    """
    plan = reader.plan
    blocks: list[nn.Module] = [block.module for block in plan.blocks]
    tail = find_tail(plan.model, blocks)
    missing = [name for name in tail.parameters if not plan.links.tensors(name)]
    if missing:
        raise LlmqError(f"{plan.source.folder}: the checkpoint has no tensor for {missing[0]}")
    with in_memory(reader, tail):
        tail.settle(hidden.to(reader.device, plan.dtype), shape)
        yield Judge(reader, tail, {name: plan.model.get_parameter(name).detach() for name in tail.parameters})
