"""The formulas of the papers by hand, and what a recipe's methods and options may be."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from llmq import methods
from llmq.block.statistics import Hessian, Inputs, MeanSquare
from llmq.discovery.pairs import Consumer, Pair
from llmq.grids.scheme import Scheme
from llmq.methods._pair_scales import Candidate, Side
from llmq.methods.awq import AWQ
from llmq.methods.base import Method
from llmq.methods.gptq import GPTQ
from llmq.methods.outlier_suppression_plus import OutlierSuppressionPlus
from llmq.methods.rtn import RTN
from llmq.methods.smoothquant import SmoothQuant
from llmq.recipe import catalog
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused

BUILT_IN = [name for name in catalog.names() if catalog.entry_point(name) is None]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def facts(**changed: Tensor) -> Side:
    """Three channels: the middle one has large inputs, the last lies to one side."""
    usual = {
        "mean": row(1, 16, 4),
        "low": row(-2, -64, 0),
        "high": row(1, 32, 16),
        "weight": row(4, 1, 2),
        "share": row(0.25, 1, 0.5),
    }
    return Side(**usual | changed)


def by_name(candidates: Iterable[Candidate]) -> dict[str, Candidate]:
    return {candidate.what: candidate for candidate in candidates}


def near(value: Tensor, *expected: float) -> bool:
    return torch.allclose(value, row(*expected), rtol=1e-5)


def test_awq_equation_5() -> None:
    """s = s_X^α, s_X = E|x|; brought to where the largest and the smallest are as far from 1."""
    found = by_name(AWQ(alphas=2)._candidates(facts()))
    assert list(found) == ["α 0.5", "α 0.5, by weight", "α 1", "α 1, by weight"]
    # √(1, 16, 4) = (1, 4, 2), over √(4 · 1) = 2.
    assert near(found["α 0.5"].scale, 0.5, 2, 1)
    # (1, 16, 4) over √16 = 4.
    assert near(found["α 1"].scale, 0.25, 4, 1)
    # As the authors' code divides by share^(1−α): (1, 4, 2) / (0.5, 1, √0.5) = (2, 4, 2.828), over √8.
    assert near(found["α 0.5, by weight"].scale, 2 / 8**0.5, 4 / 8**0.5, 1)
    assert near(found["α 1, by weight"].scale, 0.25, 4, 1)
    assert all(candidate.shift is None for candidate in found.values())


def test_awq_tries_as_many_as_told() -> None:
    assert len(by_name(AWQ(alphas=7)._candidates(facts()))) == 14
    refused(lambda: AWQ(alphas=0), "alphas must be 1 or more")
    silent = by_name(AWQ(alphas=3)._candidates(facts(mean=row(0, 0, 0), share=row(0, 0, 0))))
    assert all(bool(c.scale.isfinite().all() and (c.scale > 0).all()) for c in silent.values())


def test_smoothquant_equation_4() -> None:
    """s = max|x|^α / max|w|^(1−α): with max|x| = (2, 64, 16), max|w| = (4, 1, 2)."""
    found = by_name(SmoothQuant()._candidates(facts()))
    assert list(found) == [f"α {i / 10:g}" for i in range(11)]
    # α 0.5: (√2/2, 8, 4/√2) = (0.7071, 8, 2.8284), over √(0.7071 · 8) = 2.3784.
    assert near(found["α 0.5"].scale, 0.29730, 3.36359, 1.18921)
    # α 0: 1/max|w| = (0.25, 1, 0.5), over 0.5.
    assert near(found["α 0"].scale, 0.5, 2, 1)
    # α 1: max|x|, over √128.
    assert near(found["α 1"].scale, *(v / 128**0.5 for v in (2, 64, 16)))
    assert list(by_name(SmoothQuant(alpha=0.8)._candidates(facts()))) == ["α 0.8"]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, 85])
def test_smoothquant_alpha_is_a_share(alpha: float) -> None:
    refused(lambda: SmoothQuant(alpha=alpha), "alpha must lie between 0 and 1", "leave it out")


def test_gamma_migration() -> None:
    """Outlier Suppression §4.1: γ moves out of a norm, so that its output is as even as what it normalizes."""
    consumer = Consumer("m", 1, torch.arange(3), None)
    norm = Pair("norm", "w", None, 0, 0.0, None, 3, (consumer,), 3)
    assert near(norm.gain(row(-3, 0.5, 2)), 3, 0.5, 2)
    plus_one = Pair("norm", "w", None, 0, 1.0, None, 3, (consumer,), 3)
    assert near(plus_one.gain(row(-3, 0.5, 2)), 2, 1.5, 3)
    matrix = Pair("linear", "a", None, 0, 0.0, torch.tensor([2, 0]), 3, (consumer,), 2)
    assert near(matrix.gain(torch.tensor([[3.0, 4], [0, 1], [5, 12]])), 13, 5)


def test_outlier_suppression_plus_equations_2_and_8() -> None:
    """z = (max + min)/2 = (−0.5, −16, 8); s = max(1, range/2 / t), range/2 = (1.5, 48, 8) and t between 8 and 48."""
    found = list(OutlierSuppressionPlus(thresholds=2)._candidates(facts(), True))
    assert len(found) == 6
    for candidate in found[3:]:
        assert candidate.shift is not None and near(candidate.shift, -0.5, -16, 8)
    scales = [candidate.scale for candidate in found[3:]]
    assert near(scales[0], 1, 1, 1)  # t = 48
    assert near(scales[1], 1, 48 / (48 * 8) ** 0.5, 1)  # halfway, in ratios
    assert near(scales[2], 1, 6, 1)  # t = 8
    # Unshifted: max|x| = (2, 64, 16), t from 64 down to the median 16.
    assert all(candidate.shift is None for candidate in found[:3])
    assert near(found[2].scale, 1, 4, 1)
    assert [c.shift for c in OutlierSuppressionPlus(thresholds=2)._candidates(facts(), False)] == [None] * 3
    refused(lambda: OutlierSuppressionPlus(thresholds=0), "thresholds must be 1 or more")


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
        (("rtn",), {"dampening": 0.1}, ("--dampening", "its options are range")),
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
