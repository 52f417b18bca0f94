"""Targets as regular expressions, read by compressed-tensors' own matcher."""

from __future__ import annotations

import pytest
from compressed_tensors.utils import match_name

from llmq.planning.targets import targets

#: As the model, an old checkpoint and a causal class call them.
HOLDERS = ("model.language_model.layers", "language_model.model.layers", "model.layers")
PLACES = ("self_attn.q_proj", "mlp.experts.3.up_proj")
NAMES = {f"{holder}.{block}.{place}" for holder in HOLDERS for block in range(12) for place in PLACES}


def test_a_target_for_each_place_matches_every_block_and_spelling() -> None:
    found = targets(NAMES, {"model.visual.layers.0.self_attn.q_proj"})
    assert len(found) == 2
    # The last as vLLM calls it in a type that wraps another.
    for name in (*NAMES, "thinker.language_model.model.layers.7.self_attn.q_proj"):
        assert sum(match_name(name, target) for target in found) == 1, name


@pytest.mark.parametrize(
    "name",
    [
        "whisper_encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj_a",
        "model.language_model.layers.0.mlp.self_attn.q_proj",
        "model.language_modelxlayers.0.self_attn.q_proj",
        "submodel.layers.0.self_attn.q_proj",
        "lm_head",
    ],
)
def test_nothing_else_matches(name: str) -> None:
    assert not any(match_name(name, target) for target in targets(NAMES, set()))


def test_they_are_the_names_where_a_tower_would_match_or_a_name_is_in_no_list() -> None:
    assert targets(NAMES, {"model.visual.model.layers.0.self_attn.q_proj"}) == sorted(NAMES)
    assert targets({*NAMES, "lm_head"}, set()) == sorted({*NAMES, "lm_head"})
    assert targets({"layers.0.mlp"}, set()) == ["layers.0.mlp"]
    assert targets(set(), set()) == []
