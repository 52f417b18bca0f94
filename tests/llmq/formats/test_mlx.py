"""What is told of an MLX weight from its headers; tests of whole folders are in test_inspection_layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats.base import Row, Unclear
from llmq.formats.mlx import inspect
from tests.llmq.formats.made import stored

OUT, IN = 64, 256
bf16 = torch.bfloat16


def row(tensors: dict[str, Tensor], config: dict[str, Any], model: dict[str, Any] | None = None) -> Row:
    source: Any = SimpleNamespace(config=model or {})
    return inspect(source, "a.up", stored(tensors), "mlx", config)


def affine(bits: int, group: int) -> dict[str, Tensor]:
    """What mlx's `quantize` gives for a weight of OUT × IN, by its documentation."""
    scales = torch.ones(OUT, IN // group, dtype=bf16)
    return {"weight": torch.zeros(OUT, IN * bits // 32, dtype=torch.uint32), "scales": scales, "biases": scales}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine(bits: int, group: int) -> None:
    tensors = affine(bits, group)
    nbytes = OUT * IN * bits // 8 + 2 * 2 * OUT * IN // group
    expected = Row("a.up.weight", (OUT, IN), "int", bits, group, False, None, nbytes, "uint32")
    assert row(tensors, {"bits": bits, "group_size": group}) == expected
    assert row(tensors, {"bits": 1, "group_size": 1, "a.up": {"bits": bits, "group_size": group}}) == expected


def test_a_width_that_the_model_does_not_have() -> None:
    """8 bits in groups of 64 and 4 bits in groups of 128 are the same tensors."""
    config = {"bits": 4, "group_size": 128}
    assert row(affine(8, 64), config).shape == (OUT, 2 * IN)
    assert row(affine(8, 64), config, {"hidden_size": 2 * IN, "heads": IN}).shape == (OUT, 2 * IN)
    assert row(affine(8, 64), config, {"hidden_size": IN, "heads": 8, "head_dim": IN // 4}).shape == (OUT, 2 * IN)
    with pytest.raises(Unclear, match="8 bits 256 as the model has"):
        row(affine(8, 64), config, {"text_config": {"hidden_size": IN, "layers": 2}})


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({}, {}),
        ({}, {"bits": 4}),
        ({}, {"bits": 4, "group_size": 32}),
        ({}, {"bits": 4, "group_size": 64, "mode": "later"}),
        ({}, {"bits": 4, "group_size": 64, "mode": "mxfp4"}),
        ({}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        ({"biases": torch.ones(OUT, 1)}, {"bits": 4, "group_size": 64}),
        ({"weight": torch.zeros(OUT, IN // 8, dtype=torch.int32)}, {"bits": 4, "group_size": 64}),
        ({"scales": torch.zeros(OUT, IN // 64, dtype=torch.uint8)}, {"bits": 4, "group_size": 64}),
    ],
)
def test_what_does_not_fit(change: dict[str, Tensor], config: dict[str, Any]) -> None:
    with pytest.raises(Unclear):
        row(affine(4, 64) | change, config)
