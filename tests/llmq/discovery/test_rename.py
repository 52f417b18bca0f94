"""Renaming by transformers' own rules: names that fit stay, prefixes come and go, what is made anew is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from llmq.discovery import blocks as discover
from llmq.discovery.names import link
from llmq.discovery.rename import Rules, renamer, renamer_only
from tests.architectures import tiny


def built(kind: str, folder: Path) -> nn.Module:
    return discover.build(tiny.make(kind, folder), torch.float32)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_s_own_names_stay(kind: str, tmp_path: Path) -> None:
    model = built(kind, tmp_path)
    renamed = renamer(model)
    assert {name: renamed(name) for name in model.state_dict()} == {n: (n, False) for n in model.state_dict()}


def test_the_prefix_of_the_base_model_is_put_before_and_names_of_nothing_stay(tmp_path: Path) -> None:
    renamed = renamer(built("gpt2", tmp_path))
    assert renamed("h.1.mlp.c_fc.weight") == ("transformer.h.1.mlp.c_fc.weight", False)
    assert renamed("h.99.mlp.c_fc.weight")[1] is False
    assert renamed("wholly.unknown") == ("wholly.unknown", False)


def test_a_model_that_is_only_the_inside_of_another_loses_the_prefix(tmp_path: Path) -> None:
    model = built("gpt2", tmp_path)
    assert renamer(model.base_model)("transformer.h.1.mlp.c_fc.weight") == ("h.1.mlp.c_fc.weight", False)


def test_experts_that_are_fused_are_told(tmp_path: Path) -> None:
    model = built("mixtral", tmp_path)
    renamed = renamer(model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
    assert names and names[0] not in model.state_dict()
    for name in names:
        target, converted = renamed(name)
        assert converted and target in model.state_dict()


def test_a_model_that_transformers_does_not_know_keeps_its_names() -> None:
    renamed = renamer(nn.Sequential(nn.Linear(2, 2)))
    assert renamed("0.weight") == ("0.weight", False) and renamed("1.weight") == ("1.weight", False)


def test_a_rule_that_would_take_a_name_away_from_its_parameter_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the model has, and that a rule turns into one that it has not, stays."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [WeightRenaming(r"old", "new")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _, hf_quantizer: rules)
    renamed = renamer(nn.ModuleDict({"old": nn.Linear(2, 2), "other": nn.ModuleDict({"new": nn.Linear(2, 2)})}))
    assert renamed("other.old.weight") == ("other.new.weight", False)
    assert renamed("old.weight") == ("old.weight", False)


def test_names_before_tensors_are_joined(tmp_path: Path) -> None:
    """One expert keeps its own name; what is only renamed has the model's name."""
    only, whole = renamer_only(built("mixtral", tmp_path)), renamer(built("mixtral", tmp_path))
    old = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert "experts.1." in only(old) and whole(old)[1] and "experts.1." not in whole(old)[0]
    assert only("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("kind", ["hrm_text", "mixtral", "llama"])
def test_all_that_is_made_of_a_stored_tensor(kind: str, tmp_path: Path) -> None:
    """hrm_text cuts tensors, mixtral joins them, llama takes them as they are."""
    model = built(kind, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    links, filled = link(model, shapes), Rules(model).filled
    assert bool(links.cuts) is (kind == "hrm_text")
    for stored in shapes:
        assert filled(stored) == {name for name in {*links.names()} - tied(model) if stored in links.tensors(name)}


def tied(model: nn.Module) -> set[str]:
    """The names of parameters that are others, too."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
