"""Weights with one input and one parent share what their grid wants shared, and their values stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.block.siblings import join, siblings
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.llmq.blocks import open_block, write


@pytest.mark.parametrize("scheme", [Scheme(4, 16, grid="nvfp4"), Scheme(4, 32)], ids=str)
def test_parts_of_one_matrix_share_a_scale_of_scales(scheme: Scheme, tmp_path: Path) -> None:
    block = open_block(write("llama", tmp_path), Recipe(("rtn",), scheme))
    names = [{state.name.rpartition(".")[2] for state in states} for states in siblings(block.weights.values())]
    assert {"q_proj", "k_proj", "v_proj"} in names and {"gate_proj", "up_proj"} in names and {"down_proj"} in names
    for index, state in enumerate(block.weights.values()):
        block.set_quantized(state.parameter, round_to_nearest(state.value * 3.0**index, scheme, torch.bfloat16))
    before = {name: state.result() for name, state in block.weights.items()}
    join(block)
    for states in siblings(block.weights.values()):
        found = {float(s.quantized.stored_scale or 0) for s in states if isinstance(s.quantized, QuantizedWeight)}
        assert len(found) == 1 and (found == {0.0}) == (scheme.grid == "int")
    assert all(torch.equal(before[name], state.result()) for name, state in block.weights.items())
