"""Gains are found by what is done with a parameter, whatever it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.discovery.gains import gains


class Block(nn.Module):
    """Parameters with one axis, used in every way that a model uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(8))  # multiplies, in spite of its name
        self.plus_one = nn.Parameter(torch.rand(8))
        self.weight = nn.Parameter(torch.rand(8))  # is added, in spite of its name
        self.decay = nn.Parameter(torch.rand(8))
        self.both = nn.Parameter(torch.rand(8))
        self.unused = nn.Parameter(torch.rand(8))
        self.single = nn.Parameter(torch.rand(1))
        self.layer = nn.LayerNorm(8)
        self.root = nn.RMSNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bias.to(torch.float64) * x + self.weight
        x = x * (1.0 + self.plus_one.float()) * -torch.exp(self.decay.float())
        x = x * self.both[None, None] + self.both
        x = x * self.single
        return torch.as_tensor(self.linear(self.root(self.layer(x.float()))))


def test_what_multiplies_and_nothing_else() -> None:
    block = Block()
    found = gains(block, lambda: block(torch.rand(2, 3, 8)))
    assert found == {"bias", "plus_one", "layer.weight", "root.weight"}
