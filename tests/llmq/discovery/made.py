"""Blocks made for the tests of discovery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

WIDTH, INNER, TOKENS = 12, 20, 8


class Norm(nn.Module):
    """x / rms(x) · (offset + w) + b."""

    def __init__(self, width: int, offset: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.empty(width)), offset
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)
        return y if self.bias is None else y + self.bias


class Made(nn.Module):
    """A block of the parts given, with a forward given as a function of itself and the hidden states."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.body(self, x, *rest)


def fc(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias)


def gated(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return x + m.down(silu(m.gate(y)) * m.up(y))


def mlp(**changed: nn.Module) -> Made:
    parts: dict[str, nn.Module] = {
        "norm": Norm(WIDTH),
        "gate": fc(INNER, WIDTH),
        "up": fc(INNER, WIDTH),
        "down": fc(WIDTH, INNER),
    }
    return Made(gated, **parts | changed)
