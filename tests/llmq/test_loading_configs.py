"""What config.json says against what the files have: activation order, zero points, values of the wrong kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from tests.llmq.test_loading import apart, layers, logits
from tests.llmq.written import Case, Tensors, edit, write


def change(folder: Path, edited: Callable[[Any], Any]) -> None:
    """Changes the quantization_config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    edited(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(config: Any) -> Any:
    """The weights' part of the only config group."""
    return config["config_groups"]["group_0"]["weights"]


def drop_order(state: Tensors) -> None:
    for name in [n for n in state if n.endswith("g_idx")]:
        del state[name]


@pytest.mark.parametrize(
    "case, key, value, stored",
    [
        (Case("gptq"), "desc_act", True, True),
        (Case("gptq"), "desc_act", False, False),
        (Case("ct"), "actorder", "static", False),
        (Case("ct"), "actorder", "weight", False),
        (Case("ct"), "actorder", False, False),
    ],
)
def test_no_order(case: Case, key: str, value: Any, stored: bool, tmp_path: Path) -> None:
    """A g_idx in the natural order, and none where the configuration needs none, load."""
    dense = write(tmp_path / "m", case)
    if not stored:
        edit(tmp_path / "m", drop_order)
    change(tmp_path / "m", lambda own: (own if case.kind == "gptq" else weights_of(own)).update({key: value}))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert layers(model)
    assert apart(logits(model), logits(dense)) < 1e-4


@pytest.mark.parametrize("value", ["group", "Group", "dynamic", True])
def test_order_by_every_name_of_it(value: Any, tmp_path: Path) -> None:
    """compressed-tensors has called it by several names; each needs the g_idx."""
    dense = write(tmp_path / "m", Case("ct", order=True))
    change(tmp_path / "m", lambda own: weights_of(own).update(actorder=value))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert apart(logits(model), logits(dense)) < 1e-4
    edit(tmp_path / "m", drop_order)
    with pytest.raises(llmq.LlmqError, match="weight_g_idx is missing"):
        llmq.load(tmp_path / "m", device_map="cpu")
