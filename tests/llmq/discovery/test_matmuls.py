"""Products with parameters, seen however they are written: whose, along which axis, how much of it; modules called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery.matmuls import Matmul, Products, watch_matmuls, watch_modules

OUT, IN, TOKENS = 6, 4, 5
Use = Callable[[Tensor, Tensor], Tensor]
"""A parameter and inputs [5, 4] → their product."""


class Holder(nn.Module):
    """A parameter, and another that nothing is multiplied by."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w, self.unused = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(2, 2))


def seen(holder: Holder, use: Use, x: Tensor | None = None) -> list[Matmul]:
    with torch.no_grad(), watch_matmuls(holder) as found:
        use(holder.w, torch.randn(TOKENS, IN) if x is None else x)
    return found


STORED_OUT_IN: dict[str, Use] = {
    "linear": lambda w, x: nn.functional.linear(x, w),
    "linear by name": lambda w, x: nn.functional.linear(input=x, weight=w),
    "matmul": lambda w, x: torch.matmul(x, w.t()),
    "Tensor.matmul": lambda w, x: x.matmul(w.t()),
    "@": lambda w, x: x @ w.mT,
    "mm": lambda w, x: torch.mm(x, mat2=w.t()),
    "Tensor.mm": lambda w, x: x.mm(w.t()),
    "addmm": lambda w, x: torch.addmm(torch.zeros(OUT), x, w.t()),
    "Tensor.addmm": lambda w, x: torch.zeros(OUT).addmm(x, w.t()),
    "from the left": lambda w, x: w @ x.t(),
}
STORED_IN_OUT: dict[str, Use] = {
    "@": lambda w, x: x @ w,
    "addmm": lambda w, x: torch.addmm(torch.zeros(OUT), x, w),
    "linear": lambda w, x: nn.functional.linear(x, w.t()),
}


@pytest.mark.parametrize("use", STORED_OUT_IN)
def test_a_product_sums_over_the_last_axis_of_a_matrix_stored_out_in(use: str) -> None:
    (found,) = seen(Holder(OUT, IN), STORED_OUT_IN[use])
    assert (found.parameter, found.axis, found.whole, found.part, found.chosen) == ("w", 1, True, (0, OUT * IN), False)


@pytest.mark.parametrize(
    ("use", "axis", "along", "dense"),
    [
        (lambda w, x: x @ w.t(), 1, 1, True),
        (lambda w, x: x @ w[2:5].t(), 1, 1, True),
        (lambda w, x: torch.randn(2, 3) @ w[2:5], None, 0, True),
        (lambda w, x: x[:, :2] @ w[:, 1:3].t(), None, 1, False),
        (lambda w, x: x @ w[::2].t(), 1, 1, False),
        (lambda w, x: torch.einsum("ni,oi->no", x, w), None, None, True),
    ],
)
def test_which_part_of_a_matrix_is_used(use: Use, axis: int | None, along: int | None, dense: bool) -> None:
    (found,) = seen(Holder(OUT, IN), use)
    assert (found.axis, found.along, found.dense) == (axis, along, dense)


@pytest.mark.parametrize("use", STORED_IN_OUT)
def test_a_product_sums_over_the_first_axis_of_a_matrix_stored_in_out(use: str) -> None:
    (found,) = seen(Holder(IN, OUT), STORED_IN_OUT[use])
    assert (found.parameter, found.axis, found.whole) == ("w", 0, True)


@pytest.mark.parametrize("use", [torch.bmm, torch.Tensor.bmm, lambda x, w: torch.baddbmm(torch.zeros(1), x, w)])
def test_a_stack_of_matrices_is_no_whole_matrix(use: Use) -> None:
    (found,) = seen(Holder(3, IN, OUT), lambda w, x: use(x, w), torch.randn(3, TOKENS, IN))
    assert (found.axis, found.whole, found.tokens) == (1, False, 3 * TOKENS)
    (found,) = seen(Holder(3, OUT, IN), lambda w, x: use(x, w.mT), torch.randn(3, TOKENS, IN))
    assert found.axis == 2


def test_an_axis_that_einsum_hides_is_not_guessed() -> None:
    (found,) = seen(Holder(OUT, IN), lambda w, x: torch.einsum("ti,oi->to", x, w))
    assert found.axis is None and found.whole


def test_an_axis_that_was_cut_or_merged_is_not_guessed() -> None:
    (found,) = seen(Holder(OUT, IN), lambda w, x: x[:, :2] @ w[:, :2].t())
    assert found.axis is None and not found.whole
    (found,) = seen(Holder(OUT, IN), lambda w, x: torch.randn(3, OUT * IN) @ w.view(OUT * IN, 1))
    assert found.axis is None


def test_the_part_that_is_used_is_where_it_lies() -> None:
    first, second = seen(Holder(OUT, IN), lambda w, x: (x @ w[:2].t()) @ torch.ones(2, 2) + x @ w[4:].t())
    assert (first.part, second.part) == ((0, 2 * IN), (4 * IN, 2 * IN))
    assert not first.whole and not second.whole and first.axis == second.axis == 1


def test_the_input_is_kept_as_it_was_and_its_rows_are_counted() -> None:
    x = torch.randn(2, 3, IN)
    (found,) = seen(Holder(OUT, IN), lambda w, x: nn.functional.linear(x, w), x)
    assert found.input is x and found.tokens == 6


def test_what_is_no_product_with_a_parameter_is_not_seen() -> None:
    assert not seen(Holder(OUT, IN), lambda w, x: x @ x.t())
    assert not seen(Holder(OUT, IN), lambda w, x: w * 2 + w.t().reshape(OUT, IN))
    assert not seen(Holder(OUT, IN), lambda w, x: x @ w.clone().t())
    # A vector is no matrix: neither is the parameter, nor what it is multiplied by.
    assert not seen(Holder(IN), lambda w, x: x @ w)
    assert not seen(Holder(OUT, IN), lambda w, x: w @ x[0])


def test_a_parameter_of_a_product_with_itself_is_seen_on_both_sides() -> None:
    first, second = seen(Holder(OUT, IN), lambda w, x: w @ w.t())
    assert (first.axis, second.axis) == (1, 1)


CHOICES: dict[str, Use] = {
    "topk": lambda w, x: torch.topk(x, 2)[0],
    "Tensor.topk": lambda w, x: x.topk(2)[0],
    "argmax": lambda w, x: torch.argmax(x),
    "Tensor.argmax": lambda w, x: x.argmax(),
    "sort": lambda w, x: torch.sort(x)[0],
    "Tensor.sort": lambda w, x: x.sort()[0],
    "argsort": lambda w, x: torch.argsort(x),
    "Tensor.argsort": lambda w, x: x.argsort(),
    "nonzero": lambda w, x: torch.nonzero(x),
    "Tensor.nonzero": lambda w, x: x.nonzero(),
    "one_hot": lambda w, x: nn.functional.one_hot(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_comes_after_a_choice_is_told_from_what_comes_before(choice: str) -> None:
    def use(w: Tensor, x: Tensor) -> Tensor:
        before = x @ w.t()
        CHOICES[choice](w, x)
        return before + x @ w.t()

    assert [found.chosen for found in seen(Holder(OUT, IN), use)] == [False, True]


def test_a_largest_value_is_no_choice() -> None:
    assert [found.chosen for found in seen(Holder(OUT, IN), lambda w, x: x.softmax(-1).amax() * (x @ w.t()))] == [False]


def test_nothing_is_seen_once_the_context_is_closed() -> None:
    holder = Holder(OUT, IN)
    with torch.no_grad(), watch_matmuls(holder) as found:
        pass
    nn.functional.linear(torch.randn(TOKENS, IN), holder.w)
    assert not found


def test_operands_can_be_changed_before_the_product_is_made() -> None:
    class Doubled(Products):
        """Twice the first operand."""

        def product(
            self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (args[0] * 2, *args[1:]), kwargs

    a, b = torch.randn(2, 3), torch.randn(3, 4)
    want = 2 * (a @ b)
    with Doubled():
        assert torch.equal(a @ b, want) and torch.equal(a + a, a * 2)
    with Products(), pytest.raises(NotImplementedError):
        a @ b


class Parts(nn.Module):
    """A Linear called twice, one never called, two norms, one of which gives a tuple, a matrix that is no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.idle, self.norm = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.LayerNorm(IN)
        self.pair, self.table, self.act = Pairs(), nn.Embedding(3, IN), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(self.linear(x)))
        return self.act(y) + self.pair(y)[0] + self.table(torch.tensor([0]))


class Pairs(nn.Module):
    """A vector that is multiplied by, and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(IN))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x


def test_calls_of_linears_are_counted_and_outputs_of_norms_are_kept() -> None:
    parts, x = Parts(), torch.randn(TOKENS, IN)
    with torch.no_grad(), watch_modules(parts) as found:
        parts(x)
    assert found.linears == {"linear": 2} and len(found.norms) == 1
    with torch.no_grad():
        assert torch.equal(found.norms[0], parts.norm(parts.linear(parts.linear(x))))
    parts(x)
    assert found.linears == {"linear": 2} and len(found.norms) == 1


def test_hooks_go_when_something_fails_inside() -> None:
    parts = Parts()
    with pytest.raises(ZeroDivisionError), watch_modules(parts):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in parts.modules())


def test_a_module_with_parts_of_its_own_is_no_norm() -> None:
    """Its own parameters are vectors, but what it gives is made by its parts too."""

    class Outer(nn.Module):
        """A vector and a part."""

        def __init__(self) -> None:
            super().__init__()
            self.gain, self.part = nn.Parameter(torch.ones(IN)), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) * self.gain

    outer = Outer()
    with watch_modules(outer) as found:
        outer(torch.ones(2, IN))
    assert not found.norms and not found.linears


def test_an_addend_with_two_axes_is_no_operand() -> None:
    module = nn.Module()
    module.weight, module.added = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5, 3))
    x = torch.ones(5, 4)
    with watch_matmuls(module) as seen, torch.no_grad():
        torch.addmm(module.added, x, module.weight)
    assert [(matmul.parameter, matmul.tokens, matmul.axis) for matmul in seen] == [("weight", 5, 0)]
    assert seen[0].input is x
