"""The group that makes stock transformers refuse a folder, and nothing else in the configuration."""

from __future__ import annotations

import re

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from torch import nn

from llmq import formats
from llmq.formats.compressed_tensors.config import config_of
from llmq.formats.served import GUARD, NOTHING, WORDS, guarded, unguarded
from llmq.grids.scheme import Scheme

SECTION = config_of({Scheme(4, 16, grid="nvfp4"): ["a.experts.0.up"], Scheme(4, 32, grid="mxfp4"): ["a.q"]}, ["head"])


def test_the_group_is_taken_off_again() -> None:
    made = guarded(SECTION)
    assert [*made["config_groups"]] == [GUARD, "group_0", "group_1"]
    assert unguarded(made) == SECTION and unguarded(SECTION) is SECTION
    assert unguarded({"config_groups": None}) == {"config_groups": None}
    other = made | {"config_groups": {GUARD: SECTION["config_groups"]["group_0"]}}
    assert unguarded(other) is other


def test_compressed_tensors_refuses_it_and_quotes_the_reason() -> None:
    with pytest.raises(ValueError, match=re.escape(WORDS)):
        QuantizationConfig.model_validate(guarded(SECTION))


@pytest.mark.parametrize("name", ["", "experts", "a.experts.0.up", "model.layers.0.mlp.experts.0.gate_proj"])
def test_it_matches_no_module(name: str) -> None:
    assert not is_match(name, nn.Linear(1, 1), [NOTHING]) and not re.match(NOTHING.removeprefix("re:"), name)


def test_a_folder_with_it_is_read_dense() -> None:
    assert formats.read_by_stock("compressed-tensors", guarded(SECTION))
    assert not formats.read_by_stock("compressed-tensors", unguarded(guarded(SECTION)))
