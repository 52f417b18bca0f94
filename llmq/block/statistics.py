"""Statistics of a weight's input for methods, collected while a block runs on the calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from llmq.block.gram import add_gram, mirror
from llmq.block.products import fast, parts
from llmq.discovery.inputs import Takes
from llmq.spill import Saving, zeros


class Statistic(Protocol):
    """A statistic of a weight's input, constructed with the input's width and the device of its tensors.

    `blend(other, alpha)` is optional: it replaces the mean over samples by α times it and (1 − α) times that of another
    one of the same kind and width, and leaves `other` and the number of samples unchanged. Routed experts need it.
    QUADRATIC, if true, says that it sums squares and products of inputs, which a row of weight w scales by w².
    `sums()` is optional too, for statistics that take long: what can be updated one after the other instead of the
    whole, each with its own tensor `total`; the whole has a `count` besides. Ranks then work on them side by side.
    """

    def __init__(self, width: int, device: torch.device) -> None: ...

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""

    def merge(self, other: Self) -> None:
        """Add the samples of another one of the same kind and width, as if they came later; `other` is unchanged."""

    @classmethod
    def nbytes(cls, width: int) -> int:
        """The memory of its tensors, in bytes."""


def in_passes(widths: Mapping[int, int], needs: Sequence[type[Statistic]]) -> list[list[int]]:
    """Inputs, of which the width is given, in groups whose statistics take no more than those of the widest input.

    Where memory is limited, those of a group are collected in one pass.
    """
    sizes = {key: sum(need.nbytes(width) for need in needs) for key, width in widths.items()}
    found, room = list[list[int]](), 0
    for key, nbytes in sizes.items():
        if not found or nbytes > room:
            found.append([])
            room = max(sizes.values())
        found[-1].append(key)
        room -= nbytes
    return found


class MeanSquare:
    """E[x²] of each input channel, float32 [width]: the importance of a column."""

    QUADRATIC = True

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.total += rows.square().sum(0)
        self.count += rows.shape[0]

    def merge(self, other: Self) -> None:
        """Add the samples of another one of the same width."""
        self.total += other.total.to(self.total.device)
        self.count += other.count

    def blend(self, other: Self, alpha: float) -> None:
        """See `Statistic`."""
        _blend(self.total, self.count, other.total, other.count, alpha)
        self.count = max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """E[x²], float32 [width]."""
        return (self.total / max(1, self.count)).float()

    @classmethod
    def nbytes(cls, width: int) -> int:
        """The memory of its tensors, in bytes."""
        return 8 * width


class Hessian:
    """Σ x xᵀ of a weight's input: the Hessian of its output error up to a factor (Frantar et al., 2022, §3.1).

    count: tokens summed.
    """

    QUADRATIC = True

    def __init__(self, width: int, device: torch.device) -> None:
        self._sums = zeros((width, width), torch.float32, device, Saving.PASSES)
        self._whole = True
        self.count = 0

    @property
    def total(self) -> Tensor:
        """Σ x xᵀ; only one of two equal sums is computed while tokens are added."""
        if not self._whole:
            mirror(self._sums)
            self._whole = True
        return self._sums

    def update(self, x: Tensor) -> None:
        """Add x [..., width], in any float dtype; products are summed in float32."""
        rows = x.reshape(-1, x.shape[-1]).float()
        with fast(x.dtype, rows.device):
            for total, part in parts(self._sums):
                add_gram(total, rows, part)
        self._whole = False
        self.count += rows.shape[0]

    def sums(self) -> list[Takes]:
        """See `Statistic`; they are to be updated."""
        self._whole = False
        return [_Rows(self, total, part) for total, part in parts(self._sums)]

    def merge(self, other: Self) -> None:
        """Add the samples of another one of the same width."""
        self.total.add_(other.total.to(self._sums.device))
        self.count += other.count

    def blend(self, other: Self, alpha: float) -> None:
        """See `Statistic`."""
        _blend(self.total, self.count, other.total, other.count, alpha)
        self.count = max(1, self.count)

    @classmethod
    def nbytes(cls, width: int) -> int:
        """The memory of its tensors, in bytes."""
        return 4 * width * width


class _Rows:
    """Some rows of a Hessian's sum; the first of them counts the tokens."""

    def __init__(self, hessian: Hessian, total: Tensor, part: slice) -> None:
        self.hessian, self.total, self.part = hessian, total, part

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        with fast(x.dtype, rows.device):
            add_gram(self.total, rows, self.part)
        if not self.part.start:
            self.hessian.count += rows.shape[0]


class Inputs:
    """Statistics for transforms: each channel's mean magnitude and extremes, and some whole rows.

    mean_abs, mean_square, low, high: float32 [width]; rows: float32 [at most 512, width], evenly spread
    over all tokens.
    """

    ROWS = 512

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self.rows = torch.empty(0, width, device=device)
        self.count = 0
        self.stride = 1

    def update(self, x: Tensor) -> None:
        """Add x [..., width]."""
        new = x.reshape(-1, x.shape[-1]).float()
        if not len(new):
            return
        self.total += new.abs().sum(0)
        self.squares += new.square().sum(0)
        self.low = torch.minimum(self.low, new.amin(0))
        self.high = torch.maximum(self.high, new.amax(0))
        self.rows = torch.cat([self.rows, new[-self.count % self.stride :: self.stride]])
        self.count += new.shape[0]
        self._thin()

    def merge(self, other: Self) -> None:
        """Add the samples of another one of the same width; its tokens count as the later ones."""
        device = self.total.device
        self.total += other.total.to(device)
        self.squares += other.squares.to(device)
        self.low = torch.minimum(self.low, other.low.to(device))
        self.high = torch.maximum(self.high, other.high.to(device))
        # Strides are powers of two, so the denser sample can be thinned to the stride of the sparser one.
        stride = max(self.stride, other.stride)
        mine, theirs = self.rows[:: stride // self.stride], other.rows[:: stride // other.stride].to(device)
        self.rows, self.stride = torch.cat([mine, theirs]), stride
        self.count += other.count
        self._thin()

    def blend(self, other: Self, alpha: float) -> None:
        """See `Statistic`; extremes are those of both, and 1 − α of the rows are the other's."""
        _blend(self.total, self.count, other.total, other.count, alpha)
        _blend(self.squares, self.count, other.squares, other.count, alpha)
        device = self.total.device
        self.low = torch.minimum(self.low, other.low.to(device))
        self.high = torch.maximum(self.high, other.high.to(device))
        own = alpha if len(self.rows) else 0.0
        shares = ((len(self.rows), own), (len(other.rows), 1 - own))
        total = min([self.ROWS, *(count / share for count, share in shares if share > 0)])
        mine = round(own * total)
        self.rows = torch.cat([_spread(self.rows, mine), _spread(other.rows.to(device), round(total) - mine)])
        self.count = max(1, self.count)

    def _thin(self) -> None:
        while len(self.rows) > self.ROWS:
            self.rows = self.rows[::2].clone()
            self.stride *= 2

    @property
    def mean_abs(self) -> Tensor:
        """E|x|, float32 [width]."""
        return (self.total / max(1, self.count)).float()

    @property
    def mean_square(self) -> Tensor:
        """E[x²], float32 [width]."""
        return (self.squares / max(1, self.count)).float()

    @classmethod
    def nbytes(cls, width: int) -> int:
        """The memory of its tensors, in bytes."""
        return (24 + 4 * 2 * cls.ROWS) * width


def _blend(own: Tensor, count: int, other: Tensor, others: int, alpha: float) -> None:
    """Change a sum over `count` samples in place: its mean becomes α · own + (1 − α) · other, for at least 1 sample."""
    own.mul_(alpha).add_(other.to(own.device), alpha=(1 - alpha) * max(1, count) / max(1, others))


def _spread(rows: Tensor, count: int) -> Tensor:
    """Up to `count` rows, evenly spread over all."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows)), device=rows.device).long()]
