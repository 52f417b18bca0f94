"""Random low-bit weights in the plain form, with the dense float64 weight that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """words, scale and zero as the operators take them; dense: float64 [out, in], by numpy."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    dense: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """out, in."""
        return self.dense.shape[0], self.dense.shape[1]


def plain(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    factor: float = 1.0,
) -> Plain:
    """Signed codes, scales of both signs, times `factor`, and zero points over the whole range; written bit by bit."""
    generator = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    groups = -(-in_features // group_size)
    codes = generator.integers(-half, half, (out_features, in_features))
    scale = torch.from_numpy(generator.uniform(0.005, 0.02, (out_features, groups)) * generator.choice([-1, 1, 1], 1))
    scale = (scale * factor).to(dtype)
    zero = None if symmetric else generator.integers(-half, half, (out_features, groups))
    return Plain(
        bit_stream(codes + half, bits),
        scale,
        None if zero is None else torch.from_numpy(zero.astype(np.int8)),
        torch.from_numpy(dense(codes, scale.double().numpy(), zero, group_size)),
        bits,
        group_size,
    )


def bit_stream(stored: np.ndarray, bits: int) -> Tensor:
    """Unsigned codes [rows, n] as int32 words: the lowest bit first, row by row."""
    rows, n = stored.shape
    width = -(-n * bits // 32) * 32
    stream = np.zeros((rows, width), dtype=np.uint8)
    for bit in range(bits):
        stream[:, bit : n * bits : bits] = (stored >> bit) & 1
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


def dense(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, group_size: int) -> np.ndarray:
    """(code − zero) · scale, a column at a time, in float64."""
    weight = np.empty(codes.shape)
    for column in range(codes.shape[1]):
        group = column // group_size
        weight[:, column] = (codes[:, column] - (0 if zero is None else zero[:, group])) * scale[:, group]
    return weight


def tolerance(x: Tensor, weight: Tensor) -> Tensor:
    """How far a product in x's dtype may be from float64's: the weight and the result are each rounded once, and the
    sum is made in float32.

    x: [M, in]; weight: float64 [out, in]. Returns float64 [M, out]: 2 roundings of the terms' magnitudes, as they add
    up at random (the root of the sum of their squares, six of them), one of the result, and the sum's. Each of its
    n additions rounds a partial sum, of mean square k/n · terms², by eps/√12 at most, as standard deviation: together
    eps √(n/24) terms, six of them.
    """
    step = torch.finfo(x.dtype).eps
    added = torch.finfo(torch.float32).eps * (x.shape[1] / 24) ** 0.5
    terms = ((x.double() ** 2) @ (weight**2).t()).sqrt()
    return 6 * (step + added) * terms + 2 * step * (x.double() @ weight.t()).abs() + 1e-6
