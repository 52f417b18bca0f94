"""Presets: each can be made, says when to choose it, and files of the user's own are read in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmq import methods
from llmq.recipe import catalog, presets
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused

BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks.md"


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_can_be_made(name: str) -> None:
    made = presets.recipe(name)
    assert isinstance(made, Recipe)
    assert set(made.methods) <= set(catalog.names()) and methods.make(made).quantizer.grids()
    advice = presets.advice(name)
    assert 1 <= advice.count(".") - advice.count("0.") <= 2 and advice.endswith(".") and len(advice) < 200
    assert Recipe.from_dict(made.to_dict()) == made


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_its_file_without_what_describes_it(name: str) -> None:
    data = yaml.safe_load((presets.FOLDER / f"{name}.yaml").read_text())
    advice, measured = data.pop("advice"), data.pop("measured")
    assert presets.read(name) == data and presets.advice(name) == advice and advice.endswith(".")
    assert presets.measured(name) == presets.Measured(**measured)
    assert presets.recipe(name) == Recipe.from_dict(data)


@pytest.mark.parametrize("name", presets.names())
def test_what_a_preset_measured_is_in_the_documents(name: str) -> None:
    rows = [line for line in BENCHMARKS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].split("|")]
    measured = presets.measured(name)
    assert f"{measured.kl:.4f}" in cells and f"{measured.time:g}" in cells
    assert "+".join(presets.recipe(name).methods) in cells


def test_names_are_those_of_the_files() -> None:
    assert presets.names() == sorted(path.stem for path in presets.FOLDER.iterdir() if path.suffix == ".yaml")
    assert "w4a16-gptq" in presets.names()


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("advice: never\nmethods: rtn\nscheme: {bits: 3}\n")
    assert presets.read(str(file)) == {"methods": "rtn", "scheme": {"bits": 3}}
    assert presets.recipe(str(file)).scheme.bits == 3
    other = tmp_path / "no ending"
    other.write_text("")
    assert presets.read(str(other)) == {}


def test_a_preset_goes_before_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nf4").write_text("methods: rtn")
    assert presets.read("nf4") != {"methods": "rtn"}


def test_what_is_neither_is_told_with_the_nearest(tmp_path: Path) -> None:
    refused(
        lambda: presets.read("w4a16-gtpq"),
        "--recipe 'w4a16-gtpq'",
        "nf4, vq-1, vq-2, w2a16",
        "did you mean 'w4a16-gptq'",
    )
    refused(lambda: presets.read(str(tmp_path / "none.yaml")), f"{tmp_path / 'none.yaml'}: cannot be read as YAML")
    (tmp_path / "list.yaml").write_text("[a]")
    refused(lambda: presets.read(str(tmp_path / "list.yaml")), "list.yaml: must be a mapping, not ['a']")
    (tmp_path / "wrong.yaml").write_text("scheme: {bits: 99}")
    refused(lambda: presets.recipe(str(tmp_path / "wrong.yaml")), "wrong.yaml: scheme", "from 2 to 8")
