"""What a recipe's methods and options may be, and what the catalog says of each."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from llmq import methods
from llmq.block.statistics import Hessian, Inputs, MeanSquare
from llmq.grids.scheme import Scheme
from llmq.methods.awq import AWQ
from llmq.methods.base import Method
from llmq.methods.gptq import GPTQ
from llmq.methods.rtn import RTN
from llmq.methods.smoothquant import SmoothQuant
from llmq.recipe import catalog
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused

BUILT_IN = [name for name in catalog.names() if catalog.entry_point(name) is None]


def made(*names: str, **options: Any) -> methods.Pipeline:
    return methods.make(Recipe(methods=names, options=options))


def test_the_parts_of_a_pipeline() -> None:
    found = made("smoothquant", "awq", "gptq")
    assert [type(m).__name__ for m in found.transforms] == ["SmoothQuant", "AWQ"]
    assert type(found.quantizer) is GPTQ and not found.refiners
    assert found.passes == ((Inputs,), (Inputs,), (Hessian,)) and found.first == () and found.calibrated
    alone = made("awq")
    assert alone.transforms == (alone.quantizer,) and type(alone.quantizer) is AWQ
    only = made("smoothquant")
    assert type(only.quantizer) is RTN and only.quantizer.quantize_needs == ()
    assert made("gptq").first == (Hessian,) and not made("rtn").calibrated
    assert made("rtn", range="weighted").passes == ((MeanSquare,),)


def test_a_method_that_transforms_and_quantizes_only_transforms_before_a_quantizer() -> None:
    found = made("awq", "rtn")
    assert [type(m) for m in found.transforms] == [AWQ] and type(found.quantizer) is RTN


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("rtn", "gptq"), ("rtn and gptq both quantize", "choose one")),
        (("awq", "rtn", "gptq"), ("rtn and gptq both quantize",)),
        (("smoothquant", "smoothquant"), ("smoothquant+smoothquant", "twice")),
        (("gptq", "gptq"), ("gptq+gptq", "twice")),
        (("awq", "gptq", "awq"), ("twice",)),
        (("gptq", "smoothquant"), ("write 'smoothquant+gptq'",)),
        (("gptq", "awq"), ("write 'awq+gptq'",)),
        (("gptq", "smoothquant", "awq"), ("write 'smoothquant+awq+gptq'",)),
        (("smoothqant",), ("did you mean 'smoothquant'?",)),
    ],
)
def test_an_order_that_means_nothing(names: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(lambda: made(*names), *words)


def test_options_go_to_the_methods_that_take_them() -> None:
    found = made("smoothquant", "gptq", alpha=0.6, damping=0.2, range="mse")
    (smooth,) = found.transforms
    assert isinstance(smooth, SmoothQuant) and smooth.alpha == 0.6
    assert isinstance(found.quantizer, GPTQ) and (found.quantizer.damping, found.quantizer.range) == (0.2, "mse")
    default = made("smoothquant", range="minmax").quantizer
    assert isinstance(default, RTN) and default.range == "minmax"
    assert made("rtn").quantizer.range == RTN().range  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("rtn",), {"damping": 0.1}, ("--damping", "not an option of method 'rtn'", "gptq")),
        (("hqq",), {"range": "weighted"}, ("--range", "'hqq'", "gptq, rtn")),
        (("rtn",), {"dampening": 0.1}, ("--dampening", "its options are correct, range")),
        (("nf4",), {"dampening": 0.1}, ("its options are none",)),
        (("gptq",), {"sweeps": 1.5}, ("sweeps must be a whole number",)),
        (("gptq",), {"sweeps": True}, ("sweeps must be a whole number",)),
        (("gptq",), {"act_order": "groupd"}, ("act-order", "did you mean 'grouped'")),
        (("smoothquant",), {"alpha": "half"}, ("alpha must be a number or null",)),
        (("awq", "gptq"), {"range": "wieghted"}, ("range", "did you mean 'weighted'")),
    ],
)
def test_an_option_that_cannot_be(names: tuple[str, ...], options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: made(*names, **options), *words)


def test_schemes_that_methods_are_for() -> None:
    assert Recipe(methods=("gptq",)).scheme == Scheme()
    assert Recipe(methods=("nf4",)).scheme == Scheme(4, 64, grid="nf4", double_quant=True)
    smooth = Recipe(methods=("smoothquant", "gptq")).scheme
    assert (smooth.bits, smooth.group_size) == (8, None) and smooth.activations is not None


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_catalog_says_what_the_class_is(name: str) -> None:
    """What is read from the source without importing it is what importing it shows."""
    said = catalog.describe(name)
    kind = methods.find(name)
    module = importlib.import_module(f"llmq.methods.{name}")
    public = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    assert [c for c in public if issubclass(c, Method)] == [kind]
    parameters = {n: p for n, p in inspect.signature(kind).parameters.items() if n != "seed"}
    hints = get_type_hints(kind.__init__)
    assert [option.name for option in said.options] == list(parameters)
    for option in said.options:
        parameter = parameters[option.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default == parameter.default and type(option.default) is type(parameter.default)
        hint = hints[option.name]
        if get_origin(hint) is Literal:
            assert option.choices == get_args(hint)
        else:
            assert option.kind in (hint, *get_args(hint)) and not option.choices
        assert len(option.help) > 10 and not option.help.endswith((".", ";")), (
            f"{name} --{option.name}: {option.help!r}"
        )
    assert said.kind == kind.__name__
    assert set(said.roles) == methods._roles(kind) and said.roles
    assert said.scheme == kind.scheme and not said.outside
    assert said.summary and "\n" not in said.summary and (kind.__doc__ or "").split()[0] == said.summary.split()[0]


@pytest.mark.parametrize(
    ("names", "options", "kind", "words"),
    [
        (("gptq",), {}, "RTN", "rounded to nearest"),
        (("rtn",), {"range": "weighted"}, "RTN", "rounded to nearest"),
        (("awq", "rtn"), {"range": "minmax"}, "RTN", "rounded to nearest"),
        (("rtn", "signround"), {}, "RTN", "rounded to nearest"),
        (("hqq",), {"p": 2.0}, "HQQ", "quantized by hqq"),
        (("nf4",), {}, "NF4", "quantized by nf4"),
    ],
)
def test_what_quantizes_without_data(names: tuple[str, ...], options: dict[str, Any], kind: str, words: str) -> None:
    pipeline = made(*names, **options)
    found = pipeline.data_free
    assert type(found).__name__ == kind and not found.quantize_needs and pipeline.how_without == words
    assert getattr(found, "p", 2.0) == 2.0 and getattr(found, "range", None) in (None, "minmax")
