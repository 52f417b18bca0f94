"""Schemes: what people read of them, what a recipe may change in them."""

from __future__ import annotations

import pytest

from llmq.errors import LlmqError
from llmq.grids.scheme import Activations, Scheme, changed_scheme


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(), "4-bit g128 symmetric"),
        (Scheme(3, None, False), "3-bit channel asymmetric"),
        (Scheme(8, None, activations=Activations()), "8-bit channel symmetric, dynamic activations"),
        (Scheme(8, None, grid="fp8", activations=Activations(False, "mse")), "fp8 channel, static (mse) activations"),
        (Scheme(4, 64, grid="nf4", double_quant=True), "nf4 g64 double-quantized"),
        (Scheme(3, None, False, scales="pow2"), "3-bit channel asymmetric, pow2 scales"),
        (Scheme(4, 32, scales="float16"), "4-bit g32 symmetric, float16 scales"),
        (Scheme(2, 64, grid="ternary"), "ternary g64"),
        (Scheme(2, 64, grid="ternary", packing="llmq"), "ternary g64, packed for llmq"),
        (Scheme(3, None, grid="kmeans", level_rows=16), "kmeans 3-bit channel, levels of 16 rows"),
        (Scheme(4, 32, grid="mxfp4", activations=Activations()), "mxfp4 g32, dynamic activations"),
        (Scheme(8, 128, grid="fp8-block"), "fp8 block g128"),
        (Scheme(activations=Activations(grid="fp8")), "4-bit g128 symmetric, dynamic fp8 activations"),
    ],
)
def test_schemes_in_words(scheme: Scheme, words: str) -> None:
    assert str(scheme) == words


def test_double_quantization_does_not_follow_to_a_grid_without_it() -> None:
    nf4 = Scheme(4, 64, grid="nf4", double_quant=True)
    assert changed_scheme({"grid": "int"}, nf4, "here") == Scheme(4, 64)
    assert changed_scheme({"group_size": 128}, nf4, "here").double_quant


def test_powers_of_two_do_not_follow_to_a_grid_without_them() -> None:
    four = Scheme(scales="pow2")
    assert changed_scheme({"grid": "fp8"}, four, "here") == Scheme(8, None, grid="fp8")
    assert changed_scheme({"bits": 3}, four, "here") == Scheme(3, scales="pow2")
    half = Scheme(scales="float16")
    assert changed_scheme({"bits": 3}, half, "here").scales == "float16"
    assert changed_scheme({"grid": "ternary"}, half, "here") == Scheme(2, grid="ternary")
    assert (four.rules.ranges, Scheme().rules.name, four.rules.name) == (("minmax", "mse", "weighted"), "int", "int")


def test_packing_does_not_follow_to_a_grid_without_it() -> None:
    own = Scheme(2, 64, grid="ternary", packing="llmq")
    assert changed_scheme({"grid": "int"}, own, "here") == Scheme(2, 64)
    assert changed_scheme({"grid": "binary"}, own, "here").packing == "llmq"
    assert own.rules.rounding == Scheme(2, 64, grid="ternary").rules.rounding and own.rules.format == "codebook"


def test_shared_levels_do_not_follow_to_a_grid_without_levels() -> None:
    shared = Scheme(3, None, grid="kmeans", level_rows=4)
    assert changed_scheme({"grid": "int"}, shared, "here") == Scheme(3, None)
    assert changed_scheme({"bits": 2}, shared, "here") == Scheme(2, None, grid="kmeans", level_rows=4)


def test_what_a_scheme_holds_and_what_readers_take_it_for() -> None:
    assert Scheme().told == "4-bit g128 symmetric"
    assert Scheme(2, 64, grid="ternary").told == "ternary g64 (1.58 bits of information, stored in 2)"
    assert Scheme(2, 64, grid="binary").told == "binary g64 (1 bits of information, stored in 2)"
    own = Scheme(2, 64, grid="ternary", packing="llmq")
    assert own.told == "ternary g64, packed for llmq (1.58 bits of information, stored in 1.6)"
    assert Scheme(2, None, grid="ternary").as_read == Scheme(2, None)
    assert Scheme(3, 64, False, scales="pow2").as_read == Scheme(3, 64, False)
    assert Scheme(8, None, grid="fp8").as_read == Scheme(8, None, grid="fp8")


def test_what_a_grid_has_only_one_of_need_not_be_said() -> None:
    assert changed_scheme({"grid": "nvfp4"}, Scheme(3, 128), "here") == Scheme(4, 16, grid="nvfp4")
    assert changed_scheme({"grid": "mxfp8"}, Scheme(), "here") == Scheme(8, 32, grid="mxfp8")
    assert changed_scheme({"grid": "fp8"}, Scheme(), "here") == Scheme(8, None, grid="fp8")
    assert changed_scheme({"grid": "ternary"}, Scheme(), "here") == Scheme(2, 128, grid="ternary")
    with pytest.raises(LlmqError, match="grid 'mxfp4' is 4 bits, symmetric, in blocks"):
        changed_scheme({"grid": "mxfp4", "group_size": 64}, Scheme(), "here")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"grid": 4}, "here: grid must be text, not 4"),
        ({"grid": "float"}, "here: grid 'float' is not known: choose from int, fp8, fp8-block, nf4"),
        ({"grid": "nf4", "bits": 3}, "here: grid 'nf4' is 4 bits, symmetric, in blocks"),
        ({"double_quant": True}, "here: double_quant is for grid 'nf4' only"),
        ({"scales": "pow3"}, "here: scales 'pow3' is not known: choose from free, pow2"),
        ({"scales": "pow2", "grid": "ternary"}, "here: scales that are powers of two (pow2) are for grid 'int' only"),
        ({"packing": "tight", "grid": "ternary"}, "here: packing 'tight' is not known: choose from standard, llmq"),
        ({"packing": "llmq"}, "here: packing 'llmq' is for grid 'vq', 'ternary', 'binary' only, not 'int'"),
        ({"level_rows": 4}, "here: level_rows is for grid 'kmeans' only, not 'int'"),
        ({"level_rows": 0}, "here: level_rows must be a whole number from 1 up, not 0"),
        ({"scales": "float16", "grid": "ternary"}, "here: scales in float16 are for grid 'int' only, not 'ternary'"),
        ({"grid": "binary", "bits": 3}, "here: grid 'binary' is 2 bits, symmetric"),
        (
            {"grid": "nf4", "group_size": 64, "activations": "dynamic"},
            "activations can be rounded to 8 bits only beside",
        ),
        ({"group_size": 128, "activations": "dynamic"}, "only beside symmetric 8-bit weights"),
        ({"grid": "nvfp4", "activations": "dynamic"}, "of grid 'nvfp4' are static: choose --activations static, or"),
        ({"bits": 3, "activations": "fp8"}, "to fp8 only beside symmetric 4-bit weights of grid 'int' or 'mxfp4', not"),
        ({"symmetric": False, "activations": "fp8"}, "to fp8 only beside symmetric 4-bit weights"),
        ({"grid": "nvfp4", "activations": "fp8"}, "to fp8 only beside symmetric 4-bit weights"),
        ({"activations": {"dynamic": False, "grid": "fp8"}}, "of grid 'int' are dynamic: choose --activations fp8"),
        ({"activations": "fp4"}, "here: activations 'fp4' is not known: choose from dynamic, static, fp8, none"),
        ({"grid": "mxfp4", "activations": "static"}, "of grid 'mxfp4' are dynamic: choose --activations dynamic, or"),
        (
            {"grid": "nvfp4", "activations": {"dynamic": False, "range": "mse"}},
            "range must be one of minmax, percentile with grid 'nvfp4', not 'mse'",
        ),
    ],
)
def test_what_cannot_be_is_told_with_its_place(values: dict[str, object], told: str) -> None:
    with pytest.raises(LlmqError) as error:
        changed_scheme(values, Scheme(), "here")
    assert told in str(error.value)


def test_inputs_on_another_grid_may_have_wider_groups() -> None:
    fp8 = Activations(grid="fp8")
    assert changed_scheme({"activations": "fp8"}, Scheme(), "here") == Scheme(activations=fp8)
    assert (Scheme(4, 32, grid="mxfp4", activations=fp8).step, Scheme(4, 32, grid="mxfp4").step) == (128, 32)
    assert (Scheme(4, 48, activations=fp8).step, Scheme(4, None, activations=fp8).step) == (48, None)


@pytest.mark.parametrize(("width", "group", "groups"), [(256, 128, 2), (96, None, 1), (96, 32, 3)])
def test_groups_of_a_row(width: int, group: int | None, groups: int) -> None:
    assert Scheme(4, group).groups(width) == groups
