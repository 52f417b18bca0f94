"""What is told of a stack of MXFP4 weights from its headers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats.base import Row, Unclear
from llmq.formats.mxfp4 import inspect
from tests.llmq.formats.made import FILE, TensorInfo

NONE: Any = None


def row(codes: Tensor, scales: Tensor) -> Row:
    tensors = {"_blocks": codes, "_scales": scales}
    parts = {end: TensorInfo(f"a.up{end}", t.dtype, tuple(t.shape), FILE, 0, t.nbytes) for end, t in tensors.items()}
    return inspect(NONE, "a.up", parts, "mxfp4", {})


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def test_bits_and_shape() -> None:
    found = row(u8(3, 10, 2, 16), u8(3, 10, 2))
    assert found == Row("a.up", (3, 10, 64), "float", 4, 32, True, None, 3 * 10 * (32 + 2), "uint8")


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (u8(3, 10, 2, 16), u8(3, 10, 1)),
        (u8(3, 10, 2, 8), u8(3, 10, 2)),
        (u8(3, 10, 2, 16).to(torch.int32), u8(3, 10, 2)),
        (u8(2, 16), u8(2)),
    ],
)
def test_what_does_not_fit(codes: Tensor, scales: Tensor) -> None:
    with pytest.raises(Unclear, match="with scales"):
        row(codes, scales)
