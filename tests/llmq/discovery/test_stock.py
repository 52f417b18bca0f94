"""Which weights a model's own loading code takes hold of: found by running that code, and nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from llmq.discovery.stock import accepts, unpackable
from llmq.formats.compressed_tensors.config import config_of, dense
from llmq.grids.scheme import Scheme
from tests.conftest import newer_transformers
from tests.llmq.classes import KINDS


class Special(nn.Linear):
    """A layer that some code for fresh weights treats by itself."""


class Careful(nn.Module):
    """Its code for fresh weights looks before it reaches for a weight, but for Special layers."""

    def __init__(self, reaches: tuple[type, ...] = (Special,)) -> None:
        super().__init__()
        self.reaches, self.calls = reaches, 0
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 4), "gate": Special(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)
        )

    def _init_weights(self, module: nn.Module) -> None:
        self.calls += 1
        if type(module) in self.reaches:
            module.weight.normal_()  # type: ignore[operator, union-attr]
        elif getattr(module, "weight", None) is not None:
            module.weight.data.zero_()  # type: ignore[union-attr]


def on_meta(kind: Any, *args: Any) -> Any:
    with torch.device("meta"):
        return kind(*args)


NAMES = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "gate")]


def test_what_the_code_reaches_for_is_found() -> None:
    model = on_meta(Careful)
    assert unpackable(model, NAMES) == {"blocks.0.gate", "blocks.1.gate"}
    assert unpackable(model, ["blocks.0.up", "blocks.1.gate"]) == {"blocks.1.gate"}
    assert unpackable(on_meta(Careful, ()), NAMES) == set()
    assert unpackable(on_meta(Careful, (Special, nn.Linear)), NAMES) == set(NAMES)


def test_every_parameter_is_back_and_in_its_place() -> None:
    model = on_meta(Careful)
    before = dict(model.named_parameters())
    unpackable(model, NAMES)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is value for name, value in before.items())


class Whole(nn.Module):
    """One block reaches into its parts, whichever of them is looked at: both are found, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Careful(())
        self.down = nn.Linear(4, 4)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self.inner.blocks[0]["up"].weight.zero_()
            self.down.weight.zero_()


def test_a_module_is_looked_at_by_the_nearest_owner_of_the_code() -> None:
    model = on_meta(Whole)
    assert unpackable(model, ["inner.blocks.0.up", "inner.blocks.1.up", "down"]) == {"inner.blocks.0.up", "down"}
    assert model.inner.calls > 0  # its parts by its own code, not by that of the model around it


@pytest.mark.parametrize("error", [RuntimeError("no memory"), AttributeError("weight"), KeyError("weight")])
def test_other_errors_of_a_model_s_code_are_no_matter(error: Exception) -> None:
    model = on_meta(Careful)

    def fails(module: nn.Module) -> None:
        raise error

    model._init_weights = fails
    before = dict(model.named_parameters())
    assert unpackable(model, NAMES) == set()
    assert all(now is before[name] for name, now in model.named_parameters())


def test_a_model_in_memory_is_not_tried() -> None:
    """Its code for fresh weights would overwrite the weights."""
    model = Careful()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert unpackable(model, NAMES) == set() and model.calls == 0
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


@newer_transformers
def test_rules_that_a_formats_rules_do_not_join(tmp_path: Path) -> None:
    """transformers cannot unpack weights while loading where one tensor of a type is cut into several parameters."""
    section = config_of({Scheme(4, 32): ["a"]}, [])
    for name, joined in (("bert", True), ("dinov2", False)):
        kind = KINDS[name]
        config = getattr(transformers, kind.config)(**kind.sizes)
        with torch.device("meta"):
            model = getattr(transformers, kind.model)(config)
        assert accepts(model, dense(section)) is joined
    assert not accepts(model, {"quant_method": "of-tomorrow"})


@pytest.mark.parametrize("packed", ["q_proj", "o_proj"])
def test_rules_that_a_formats_rules_join_where_a_name_is_packed(
    packed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """This type's vision tower has one tensor for what its decoder has three projections for, the first a q_proj."""
    pytest.importorskip("transformers.models.unlimited_ocr")
    with torch.device("meta"):
        model = transformers.UnlimitedOcrForConditionalGeneration(transformers.UnlimitedOcrConfig())
    name = f"model.language_model.layers.0.self_attn.{packed}"
    assert isinstance(model.get_submodule(name), nn.Linear)
    before = dict(model.named_modules())
    others = [other for other, module in before.items() if isinstance(module, nn.Linear) and other != name]
    assert accepts(model, config_of({Scheme(4, 32): [name]}, others)) is (packed == "q_proj")
    assert not capsys.readouterr().err
    assert dict(model.named_modules()) == before
