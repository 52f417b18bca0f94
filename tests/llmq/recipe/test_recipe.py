"""Recipes: YAML and back, unknown keys with a hint, values out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq import methods
from llmq.errors import LlmqError
from llmq.grids.scheme import RANGES, Activations, Scheme
from llmq.recipe.recipe import RAGGED, ROUTES, Calibration, Recipe, parse_override
from tests.llmq.refusal import refused

eight_bit = st.builds(
    Scheme,
    bits=st.just(8),
    group_size=st.none(),
    grid=st.sampled_from(["int", "fp8"]),
    activations=st.none() | st.builds(Activations, st.booleans(), st.sampled_from(["minmax", "mse"])),
)
schemes = (
    st.builds(
        Scheme,
        st.integers(2, 8),
        st.sampled_from([None, 16, 32, 64, 128]),
        st.booleans(),
        scales=st.sampled_from(["free", "pow2", "float16"]),
    )
    | st.builds(
        Scheme,
        st.just(2),
        st.sampled_from([None, 64]),
        grid=st.sampled_from(["ternary", "binary"]),
        packing=st.sampled_from(["standard", "llmq"]),
    )
    | st.builds(Scheme, st.integers(2, 4), st.none(), grid=st.just("kmeans"), level_rows=st.sampled_from([1, 4, 16]))
    | eight_bit
    | st.builds(Scheme, st.just(4), st.sampled_from([64, 128]), grid=st.just("nf4"), double_quant=st.booleans())
)
recipes = st.builds(
    Recipe,
    methods=st.sampled_from([("rtn",), ("gptq",)]),
    scheme=schemes,
    overrides=st.dictionaries(st.text(min_size=1, max_size=8), schemes, max_size=3).map(lambda d: tuple(d.items())),
    keep=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    include=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    model_class=st.none() | st.sampled_from(["AutoModel", "T5EncoderModel"]),
    ragged=st.sampled_from(RAGGED),
    route=st.sampled_from(ROUTES),
    options=st.fixed_dictionaries({}, optional={"range": st.sampled_from(RANGES), "sweeps": st.integers(0, 5)}),
    calibration=st.builds(Calibration, st.text(min_size=1), st.integers(1, 512), st.integers(2, 4096)),
    seed=st.integers(0, 9),
)


@given(recipes)
def test_plain_data_and_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "methods: rtn\nscheme: {bits: 3, group_size: channel}\noverrides: {down: {bits: 8}}\nkeep: [head]\n"
        "include: visual.*\nmodel_class: AutoModel\n"
    )
    recipe = Recipe.load(file)
    assert recipe.methods == ("rtn",)
    assert recipe.scheme == Scheme(3, None)
    assert recipe.overrides == (("down", Scheme(8, None)),)
    assert recipe.keep == ("head",) and recipe.include == ("visual.*",) and recipe.model_class == "AutoModel"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methds: [rtn]", ("methds", "did you mean 'methods'")),
        ("scheme: {bit: 3}", ("scheme", "did you mean 'bits'")),
        ("scheme: 3", ("scheme", "mapping")),
        ("scheme: {bits: 12}", ("from 2 to 8",)),
        ("scheme: {bits: '4'}", ("bits",)),
        ("calibration: {seqlen: 1}", ("--seqlen",)),
        ("calibration: {txt: a}", ("did you mean 'text'",)),
        ("overrides: [a]", ("overrides",)),
        ("options: 3", ("options must be a mapping",)),
        ("sweeps: 1", ("unknown key 'sweeps'",)),
        ("scheme: {grid: nf5}", ("grid 'nf5' is not known", "did you mean 'nf4'")),
        ("scheme: {grid: fp8, bits: 4}", ("grid 'fp8' is 8 bits",)),
        ("scheme: {grid: nf4, group_size: 100}", ("in blocks (group size) of 32",)),
        (
            "scheme: {activations: dynamic}",
            ("activations can be rounded to 8 bits only beside symmetric 8-bit weights",),
        ),
        ("scheme: {activations: dynamc}", ("did you mean 'dynamic'",)),
        ("scheme: {double_quant: true}", ("for grid 'nf4' only",)),
        ("a: [", ("YAML",)),
        ("a: 2024-13-45", ("YAML",)),
        ("[a]", ("mapping",)),
        ("keep: null", ("recipe.yaml", "keep must be a list", "None")),
        ("keep: 5", ("keep must be a list",)),
        ("keep: [head, 5]", ("keep must be a list, each item text",)),
        ("methods: 5", ("methods must be a list",)),
        ("overrides: null", ("overrides must map",)),
        ("overrides: {5: {bits: 8}}", ("overrides",)),
        ("overrides: {down: {bits: high}}", ("overrides: down: bits must be a whole number", "'high'")),
        ("scheme: {symmetric: 'no'}", ("scheme: symmetric must be true or false", "'no'")),
        ("scheme: {bits: true}", ("bits must be a whole number",)),
        ("scheme: {group_size: 32.0}", ("group_size must be a whole number or null",)),
        ("calibration: {samples: 1.5}", ("calibration: samples must be a whole number",)),
        ("calibration: {text: 5}", ("calibration: text must be text",)),
        ("seed: abc", ("seed must be a whole number",)),
        ("seed: true", ("seed must be a whole number",)),
    ],
)
def test_mistakes(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    refused(lambda: Recipe.load(file), *words)


@pytest.mark.parametrize("keep", ["'re:layers\\.\\d+\\.mlp'", "['re:layers\\.\\d+\\.mlp']"])
def test_a_pattern_is_not_split(keep: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"keep: {keep}")
    assert Recipe.load(file).keep == (r"re:layers\.\d+\.mlp",)


def test_types_are_checked_without_yaml_too() -> None:
    refused(lambda: Calibration(samples=True), "samples")
    refused(lambda: Recipe(keep="head"), "keep")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"act_order": "static"}, ("act_order 'static'", "--act-order", "'rtn'", "gptq")),
        ({"sweeps": 0}, ("sweeps 0", "--sweeps", "'rtn'")),
        ({"damping": 0.1}, ("damping 0.1", "--damping", "'rtn'")),
    ],
)
def test_an_option_of_another_method(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: methods.make(Recipe(methods=("rtn",), options=options)), *words)
    assert vars(methods.make(Recipe(methods=("gptq",), options=options)).quantizer).items() >= options.items()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sweeps": -1}, ("sweeps must be 0 or more",)),
        ({"sweeps": 1.5}, ("sweeps must be a whole number",)),
        ({"damping": 2.0}, ("damping must lie between 0 and 1",)),
        ({"damping": "much"}, ("damping must be a number",)),
        ({"act_order": "sttic"}, ("act-order 'sttic' is not known", "did you mean 'static'")),
        ({"range": 5}, ("range must be text",)),
    ],
)
def test_an_impossible_option(options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: methods.make(Recipe(methods=("gptq",), options=options)), *words)


def test_the_defaults_are_the_methods_own() -> None:
    assert vars(methods.make(Recipe(methods=("rtn",))).quantizer) == {"range": None, "correct": "none"}
    assert vars(methods.make(Recipe()).quantizer) == vars(methods.find("gptq")())


def test_overrides_from_the_command_line() -> None:
    assert parse_override("a=b*=bits:8,group_size:channel,symmetric:false", Scheme()) == (
        "a=b*",
        Scheme(8, None, False),
    )
    for wrong in ("bits:8", "=bits:8", "a=bits", "a=bots:8", "a=bits:99", "a=bits:{", "a=symmetric:2"):
        with pytest.raises(LlmqError):
            parse_override(wrong, Scheme())
