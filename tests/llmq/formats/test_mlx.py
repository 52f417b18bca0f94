"""What is told of an MLX weight from its headers; tests of whole folders are in test_inspection_layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats.base import Row, Unclear
from llmq.formats.mlx import inspect
from tests.llmq.formats.made import stored

OUT, IN = 64, 256
bf16 = torch.bfloat16


class Folder:
    """A model's config.json, and the weights beside the one that is looked at."""

    def __init__(self, config: dict[str, Any], beside: dict[str, Tensor]) -> None:
        self.config, self.beside = config, {f"a.{name}.weight": tensor for name, tensor in beside.items()}

    def names(self) -> list[str]:
        return list(self.beside)

    def info(self, name: str) -> Any:
        return self.beside[name]


def row(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    model: dict[str, Any] | None = None,
    beside: dict[str, Tensor] | None = None,
) -> Row:
    source: Any = Folder(model or {}, beside or {})
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


def test_the_weights_beside_it_say_its_width() -> None:
    """A shared expert of two experts' size: the model's config.json has one expert's size only."""
    config, model = {"bits": 4, "group_size": 128}, {"moe_size": IN, "shared": 2}
    wide, one = torch.zeros(2 * IN, 1), torch.zeros(IN, 1)
    with pytest.raises(Unclear, match="8 bits 256 as the model has"):
        row(affine(8, 64), config, model)
    assert row(affine(8, 64), config, model, {"gate": wide, "in": wide}).shape == (OUT, 2 * IN)
    assert row(affine(8, 64), config, model, {"gate": wide[None], "in": wide[None], "norm": wide[:, 0]}).bits == 4
    with pytest.raises(Unclear, match="8 bits 256 as the weights beside it give"):
        row(affine(8, 64), config, model | {"size": 2 * IN}, {"gate": one, "in": one})
    with pytest.raises(Unclear, match="as the model has"):  # may be gate and in as one
        row(affine(8, 64), config, model, {"gate_in": wide})


@pytest.mark.parametrize(("bits", "group"), [(5, 64), (6, 128), (8, 128), (2, 32), (3, 32)])
def test_tensors_of_one_width_only_need_no_other_word(bits: int, group: int) -> None:
    model = {str(other): IN * bits // other for other in range(2, 9)} | {"two": 2}
    del model[str(bits)]
    assert row(affine(bits, group), {"bits": bits, "group_size": group}, model).shape == (OUT, IN)


def test_an_entry_of_its_own_is_whole() -> None:
    """The router of a folder in mxfp4: its entry leaves its mode out, and mlx takes affine."""
    folder = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    made = row(affine(8, 64), folder | {"a.up": {"bits": 8, "group_size": 64}})
    assert (made.kind, made.bits, made.group, made.shape) == ("int", 8, 64, (OUT, IN))
    assert row(affine(8, 64), folder | {"a.up": {"bits": 8}}).group == 64
    assert row(affine(4, 32), {"bits": 4, "group_size": 32, "a.up": True}).bits == 4
    with pytest.raises(Unclear, match="False"):
        row(affine(4, 32), {"bits": 4, "group_size": 32, "a.up": False})


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
