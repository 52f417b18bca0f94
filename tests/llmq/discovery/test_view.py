"""A weight as a view: which numbers of a parameter it is, and what setting it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery.view import View, put


class Parameters(nn.Module):
    """A matrix, a stack of matrices, and a matrix that two modules own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.arange(24.0).reshape(6, 4), requires_grad=False)
        self.stack = nn.Parameter(torch.arange(72.0).reshape(3, 6, 4), requires_grad=False)
        self.one, self.other = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.other.weight = self.one.weight.requires_grad_(False)


MATRIX, STACK = torch.arange(24.0).reshape(6, 4), torch.arange(72.0).reshape(3, 6, 4)
PARTS = [
    (View("matrix"), "matrix", MATRIX),
    (View("matrix", rows=(1, 3)), "matrix[1:3]", MATRIX[1:3]),
    (View("matrix", transposed=True), "matrix.t()", MATRIX.t()),
    (View("matrix", rows=(0, 2), transposed=True), "matrix.t()[0:2]", MATRIX[:, :2].t()),
    (View("stack", 2), "stack[2]", STACK[2]),
    (View("stack", 1, transposed=True), "stack[1].t()", STACK[1].t()),
    (View("stack", 0, (3, 6)), "stack[0][3:6]", STACK[0, 3:]),
    (View("matrix", 1, count=3), "matrix[1]", MATRIX[2:4]),
    (View("matrix", 1, (0, 3), transposed=True, count=2), "matrix[1].t()[0:3]", MATRIX[3:, :3].t()),
    (View("stack", 2, count=3), "stack[2]", STACK[2]),
]


@pytest.mark.parametrize(("view", "name", "value"), PARTS, ids=[name for _, name, _ in PARTS])
def test_what_a_view_reads_and_writes(view: View, name: str, value: Tensor) -> None:
    module = Parameters()
    assert view.name == name and view.whole == (name == "matrix")
    assert torch.equal(view.get(module), value)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    view.set(module, -value - 1)
    assert torch.equal(view.get(module), -value - 1)
    for other, parameter in module.named_parameters():
        changed = parameter != before[other]
        assert int(changed.sum()) == (value.numel() if other == view.parameter else 0)


def test_a_whole_parameter_is_replaced_and_ties_are_kept() -> None:
    module = Parameters()
    held, value = module.one.weight.data, torch.ones(6, 4)
    before = held.clone()
    View("one.weight").set(module, value)
    assert module.one.weight is module.other.weight
    assert module.one.weight.data_ptr() == value.data_ptr()
    assert torch.equal(held, before)


def test_a_part_is_copied_into_the_parameter() -> None:
    module = Parameters()
    parameter = module.stack
    View("stack", 1).set(module, torch.ones(6, 4))
    assert module.stack is parameter and bool((parameter[1] == 1).all())


def test_what_cannot_be_written_to_is_refused() -> None:
    module = Parameters()
    module.stack = nn.Parameter(torch.zeros(6, 4)[None].expand(3, 6, 4), requires_grad=False)
    with pytest.raises(ValueError, match="no memory"):
        View("stack", 1).set(module, torch.ones(6, 4))
    module.stack = nn.Parameter(torch.zeros(3, 6, 4, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match="no memory"):
        View("stack", 1).set(module, torch.ones(6, 4))


@pytest.mark.parametrize("view", [View("matrix", 1), View("stack"), View("matrix", rows=(4, 7))])
def test_a_view_that_does_not_fit_is_refused(view: View) -> None:
    with pytest.raises(ValueError, match=view.parameter):
        view.get(Parameters())


def test_put_leaves_what_was_there_as_it_was() -> None:
    module = Parameters()
    held = {name: (p.data, p.detach().clone()) for name, p in module.named_parameters()}
    views = [View("stack", 0), View("stack", 2, transposed=True), View("matrix")]
    values = [torch.full(view.get(module).shape, 0.5, dtype=torch.float64) for view in views]
    put(module, zip(views, values, strict=True))
    for view, value in zip(views, values, strict=True):
        assert torch.equal(view.get(module), value.float())
    assert torch.equal(module.stack[1], STACK[1])
    for memory, value in held.values():
        assert torch.equal(memory, value)
