"""The options of the command line: what they make of a recipe, and those of every method from its source."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from llmq import methods
from llmq.cli.options import explained, method_options, parse_group, parse_memory, recipe_options, with_recipe
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.recipe import catalog, presets
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused


def test_nothing_given_is_the_default() -> None:
    assert recipe_options() == Recipe()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "awq+rtn"}, Recipe(methods=("awq", "rtn"))),
        ({"bits": 3, "group_size": "channel"}, Recipe(scheme=Scheme(3, None))),
        ({"symmetric": False}, Recipe(scheme=Scheme(symmetric=False))),
        ({"grid": "ternary", "group_size": "64"}, Recipe(scheme=Scheme(2, 64, grid="ternary"))),
        ({"grid": "binary", "packing": "llmq"}, Recipe(scheme=Scheme(2, 128, grid="binary", packing="llmq"))),
        (
            {"grid": "kmeans", "bits": 3, "level_rows": 16},
            Recipe(scheme=Scheme(3, None, grid="kmeans", level_rows=16)),
        ),
        ({"bits": 3, "scales": "pow2"}, Recipe(scheme=Scheme(3, scales="pow2"))),
        ({"samples": 4, "seqlen": 64}, Recipe.from_dict({"calibration": {"samples": 4, "seqlen": 64}})),
        ({"seed": 0, "keep": ["a", "b"]}, Recipe(keep=("a", "b"))),
        ({"keep": [], "override": [], "include": []}, Recipe()),
        ({"include": ["mtp.*"], "model_class": "AutoModel"}, Recipe(include=("mtp.*",), model_class="AutoModel")),
        ({"damping": 0.5, "act_order": None}, Recipe(options={"damping": 0.5})),
    ],
    ids=str,
)
def test_what_is_given_is_in_the_recipe(given: dict[str, Any], expected: Recipe) -> None:
    assert recipe_options(**given) == expected


def test_options_win_over_the_preset_beside_them() -> None:
    made = recipe_options(recipe="w4a16-gptq", bits=3, seed=7)
    preset = presets.recipe("w4a16-gptq")
    assert made == replace(preset, scheme=replace(preset.scheme, bits=3), seed=7)


def test_an_override_changes_the_scheme_that_was_chosen() -> None:
    made = recipe_options(bits=3, override=["a*=bits:8,group_size:channel", "b=symmetric:false"])
    assert made.overrides == (("a*", Scheme(8, None)), ("b", Scheme(3, 128, False)))


def test_overrides_come_after_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("overrides: {a: {bits: 8}}")
    made = recipe_options(recipe=str(file), override=["b=bits:2"])
    assert [pattern for pattern, _ in made.overrides] == ["a", "b"]


@pytest.mark.parametrize("part", ["scheme", "calibration", "options"])
def test_a_part_of_a_file_that_is_no_mapping_is_named(tmp_path: Path, part: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"{part}: 3")
    refused(lambda: recipe_options(recipe=str(file), bits=3), str(file), f"{part} must be a mapping, not 3")


def test_a_group_is_a_number_or_channel() -> None:
    assert (parse_group("128"), parse_group("channel")) == (128, "channel")
    for wrong in ("-1", "1.5", "chanel", ""):
        refused(lambda wrong=wrong: parse_group(wrong), "--group-size", repr(wrong))


def test_the_most_memory() -> None:
    assert (parse_memory(None), parse_memory("1.5GiB")) == (None, 3 * 2**29)
    with pytest.raises(LlmqError, match="--max-memory 'lots'"):
        parse_memory("lots")


def test_every_keyword_of_every_method_is_an_option_once() -> None:
    """Against the classes themselves, which are not imported to find them."""
    owners: dict[str, set[str]] = {}
    for name in catalog.names():
        for keyword in list(inspect.signature(methods.find(name)).parameters):
            owners.setdefault(keyword, set()).add(name)
    owners.pop("seed")  # of the whole recipe
    made = {p.name: p for p in method_options()}
    assert made.keys() == owners.keys() and list(made) == sorted(made)
    for name, parameter in made.items():
        option = get_args(parameter.annotation)[1]
        listed = option.help.removeprefix("(").partition(")")[0].split(", ")
        assert set(listed) == owners[name] and parameter.default is None
        flags = (option.default, *option.param_decls)[0]  # typer takes the first name for a default until it is used
        assert flags.split("/")[0] == f"--{name.replace('_', '-')}"


def command() -> tuple[typer.Typer, list[Any]]:
    app, seen = typer.Typer(), []

    @app.command()
    @with_recipe
    def run(model: str, chosen: Recipe, device: Annotated[str, typer.Option()] = "cpu") -> None:
        seen.append((model, chosen, device))

    return app, seen


def test_a_command_is_handed_the_recipe_that_its_options_make() -> None:
    app, seen = command()
    done = CliRunner().invoke(app, ["m", "--bits", "3", "--device", "cuda", "--damping", "0.5"])
    assert done.exit_code == 0, done.output
    assert seen == [("m", Recipe(scheme=Scheme(3, 128), options={"damping": 0.5}), "cuda")]


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    app, seen = command()
    done = CliRunner().invoke(app, ["m", "--bits", "99"])
    assert done.exit_code == 2 and "error:" in done.output and "from 2 to 8" in " ".join(done.output.split())
    assert not seen and "Traceback" not in done.output


@pytest.mark.parametrize(("error", "code"), [(LlmqError("[b]broken[/b]"), 2), (KeyboardInterrupt(), 130)])
def test_errors_are_turned_into_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, explained():
        raise error
    assert caught.value.exit_code == code
    said = capsys.readouterr().err
    assert said == ("error: [b]broken[/b]\n" if code == 2 else "interrupted\n")


def test_what_is_not_ours_goes_through() -> None:
    with pytest.raises(KeyError), explained():
        raise KeyError("a")
