"""What is told of compressed-tensors' weights from headers alone: the scheme of the right group, or of the shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint.source import FolderSource
from llmq.formats.base import Row, Unclear
from llmq.formats.compressed_tensors.inspect import inspect

OUT, IN = 32, 96


def row(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], module: str = "block.0.up") -> Row:
    """What is told of a module's weight whose tensors these are."""
    (folder / "config.json").write_text("{}")
    save_file({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}, folder / "model.safetensors")
    source = FolderSource(folder)
    parts = {suffix: source.info(f"{module}.{suffix}") for suffix in tensors}
    found = inspect(source, module, parts, "compressed-tensors", config)
    assert found.name == f"{module}.weight" and found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    return found


def packed(bits: int = 4, groups: int = 3, shape: bool = True) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {
        "weight_packed": torch.zeros(OUT, IN * bits // 32, dtype=torch.int32),
        "weight_scale": torch.ones(OUT, groups),
    }
    return made | ({"weight_shape": torch.tensor([OUT, IN - 1])} if shape else {})


def group(*targets: str, **weights: Any) -> dict[str, Any]:
    return {"targets": [*targets], "weights": weights}


def groups(*given: Any) -> dict[str, Any]:
    return {"config_groups": {f"group_{i}": one for i, one in enumerate(given)}}


def test_the_stored_shape_goes_before_that_of_the_words(tmp_path: Path) -> None:
    config = groups(group("Linear", num_bits=4, group_size=32))
    assert row(tmp_path, packed(), config).shape == (OUT, IN - 1)
    assert row(tmp_path, packed(shape=False), config).shape == (OUT, IN)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_width_of_words_follows_from_the_bits(tmp_path: Path, bits: int) -> None:
    found = row(tmp_path, packed(bits, shape=False), groups(group("Linear", num_bits=bits)))
    assert (found.shape, found.bits, found.group) == ((OUT, IN), bits, 32)


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        ((group("Linear", num_bits=2), group("block.0.up", num_bits=8)), 8),  # a name before a class
        ((group("Linear", num_bits=2), group(r"re:.*\.up$", num_bits=8)), 8),
        ((group("Linear", num_bits=2), group(r"re:up$", num_bits=8)), 2),  # patterns are matched from the start
        ((group("block.1.up", num_bits=8), group("Linear", num_bits=2)), 2),
        ((group("Linear", num_bits=2), group("Linear", num_bits=8)), 2),  # the first class
        ((group("block.1.up", num_bits=8),), 4),  # none: what the tensors say
        (("damaged", {"weights": None}, {"targets": None, "weights": {"num_bits": 8}}), 4),
    ],
)
def test_the_group_that_a_module_belongs_to(tmp_path: Path, given: tuple[Any, ...], bits: int) -> None:
    assert row(tmp_path, packed(bits), groups(*given)).bits == bits
    with pytest.raises(Unclear, match="words"):
        row(tmp_path, packed(3), groups(group("Linear", num_bits=bits)))


@pytest.mark.parametrize(
    ("scales", "scheme", "expected"),
    [
        ((OUT, 6), {"group_size": 16}, 16),  # what is stated
        ((OUT, 3), {}, 32),
        ((OUT, 3), {"group_size": 40}, 40),  # the last group may be short
        ((OUT, 1), {"group_size": None}, 0),
        ((1,), {"group_size": -1}, 0),
        ((), {}, 0),
    ],
)
def test_inputs_that_share_a_scale(
    tmp_path: Path, scales: tuple[int, ...], scheme: dict[str, Any], expected: int
) -> None:
    tensors = {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "weight_scale": torch.ones(scales)}
    assert row(tmp_path, tensors, groups(group("Linear", **scheme))).group == expected


@pytest.mark.parametrize(
    ("scales", "scheme", "words"),
    [
        ((OUT, 3), {"group_size": 16}, "3 scales for 96 inputs, but config.json says groups of 16"),
        ((OUT, 5), {}, "does not say how large a group is"),
        ((OUT, 2), {}, "does not say how large a group is"),  # 48, or 64 and a short one
        ((OUT, 3), {"strategy": "channel"}, "one for each row"),
        ((OUT, 3, 1), {}, "with scales [32, 3, 1]"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, scales: tuple[int, ...], scheme: dict[str, Any], words: str) -> None:
    tensors = {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "weight_scale": torch.ones(scales)}
    with pytest.raises(Unclear) as caught:
        row(tmp_path, tensors, groups(group("Linear", **scheme)))
    assert words in str(caught.value)


def test_what_the_scheme_does_not_say_the_tensors_do(tmp_path: Path) -> None:
    scale, zero = {"weight_scale": torch.ones(OUT, 1)}, {"weight_zero_point": torch.zeros(OUT, 1, dtype=torch.int8)}
    integer = {"weight": torch.zeros(OUT, IN, dtype=torch.int8)} | scale
    floating = {"weight": torch.zeros(OUT, IN).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 3)} | zero
    found = [row(tmp_path, tensors, {}) for tensors in (integer, integer | zero, floating)]
    assert [(r.kind, r.bits, r.symmetric) for r in found] == [("int", 8, True), ("int", 8, False), ("float", 8, True)]
    assert row(tmp_path, integer | zero, groups(group("Linear", symmetric=True))).symmetric is True
    assert found[2].group == 32
