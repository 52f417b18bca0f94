"""Sums of products over tokens, [rows, width], which are added to a part of the rows at a time.

Where several ranks sum, one adds to a part while the next adds to the part before (`ranks.relay`); a single process
takes the same parts, so that its products have the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PARTS = 4
LEAST = 256
"""The rows of a part, at least: fewer take longer to multiply."""


def parts(total: Tensor) -> list[tuple[Tensor, slice]]:
    """The parts of a sum [rows, width], views of it, and which rows they are."""
    rows = len(total)
    step = max(LEAST, -(-rows // PARTS))
    return [(total[start : start + step], slice(start, min(rows, start + step))) for start in range(0, rows, step)]


@contextmanager
def fast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within the context, products of float32 tensors are those of units for fewer bits, if they hold all values of a
    dtype; sums are float32 as ever.

    So products of what a model computes in bfloat16 are exact, and take a fraction of the time where a processor has
    such units: TF32 on a GPU, which holds float16 too (10 bits of mantissa), AMX for bfloat16 on a CPU. A factor of
    more bits, a difference, is rounded.
    """
    held = {"cpu": ("medium", [torch.bfloat16]), "cuda": ("high", [torch.bfloat16, torch.float16])}
    precision, dtypes = held.get(device.type, ("", []))
    if dtype not in dtypes:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The program around has set it in torch's other way, which this one refuses to mix with.
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
