"""What a method is before it says anything of its own: roles that are missing, grids, workspace, statistics."""

from __future__ import annotations

import inspect

import pytest
import torch

from llmq.block.statistics import Hessian, MeanSquare
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS
from llmq.methods.base import Method, range_refusal, statistic
from tests.llmq.refusal import refused

NF4 = Scheme(4, 64, grid="nf4")
FP8 = Scheme(8, None, grid="fp8")


@pytest.mark.parametrize("role", ["transform", "quantize", "refine", "tune"])
def test_it_has_none_of_its_roles(role: str) -> None:
    function = getattr(Method(), role)
    with pytest.raises(NotImplementedError):
        function(*[None] * len(inspect.signature(function).parameters))


def test_it_needs_nothing_and_rounds_to_whole_numbers_only() -> None:
    method = Method()
    assert (method.transform_needs, method.quantize_needs, method.refine_needs) == ((), (), ())
    assert method.grids() == ("int",) and method.refusal(Scheme()) is None and not method.float_target
    assert method.refusal(NF4) == "it rounds to the grid 'int', not to nf4 g64"
    assert method.workspace((6, 32)) == 2 * 6 * 32 and method.workspace((2, 3, 4)) == 48


def test_a_refusal_names_every_grid_that_it_knows() -> None:
    class Two(Method):
        """Knows two grids."""

        def grids(self) -> tuple[str, ...]:
            return ("int", "nf4")

    assert Two().refusal(NF4) is None
    assert Two().refusal(FP8) == "it rounds to the grid 'int, nf4', not to fp8 channel"


@pytest.mark.parametrize("scheme", [Scheme(), NF4, FP8], ids=str)
def test_a_way_to_find_scales_is_refused_where_the_grid_has_it_not(scheme: Scheme) -> None:
    has = GRIDS[scheme.grid].ranges
    for name in (None, *has):
        assert range_refusal(name, scheme) is None
    said = range_refusal("guess", scheme)
    assert said is not None and str(scheme) in said and "--range guess" in said
    assert all(name in said for name in has)


def test_the_statistic_that_was_taken_is_found_by_its_kind() -> None:
    square = MeanSquare(4, torch.device("cpu"))
    assert statistic({MeanSquare: square}, MeanSquare) is square
    refused(
        lambda: statistic({MeanSquare: square}, Hessian),
        "no Hessian statistic was collected for the input of this weight",
    )
    # One of another kind under its name counts as none.
    refused(lambda: statistic({Hessian: square}, Hessian), "no Hessian statistic was collected")
