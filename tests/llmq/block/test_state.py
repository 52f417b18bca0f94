"""The rounding of inputs before weights whose scheme rounds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmq.block.state import WeightState, rounded_inputs
from llmq.discovery.view import View
from llmq.grids.scheme import Activations, Scheme

ROUNDED = Scheme(8, None, activations=Activations())
STATIC = Scheme(8, None, activations=Activations(dynamic=False))


def one(scheme: Scheme) -> tuple[nn.Linear, WeightState]:
    torch.manual_seed(0)
    module = nn.Linear(16, 4, bias=False)
    return module, WeightState("w", View("weight"), scheme, module.weight.data, torch.float32, 0)


def per_token(x: Tensor) -> Tensor:
    """compressed-tensors' rounding of a token: its largest magnitude / 127.5 is the scale."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return ((x / scale).round().clamp(-128, 127) * scale).double()


def test_inputs_are_rounded_within_the_context_only() -> None:
    module, state = one(ROUNDED)
    x = torch.randn(1, 5, 16)
    plain = module(x)
    with rounded_inputs(module, [state]):
        found = module(x)
    torch.testing.assert_close(found.double(), per_token(x) @ module.weight.double().t(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, plain) and torch.equal(module(x), plain)


def test_schemes_without_rounding_change_nothing() -> None:
    module, state = one(Scheme(4, 8))
    x = torch.randn(1, 5, 16)
    with rounded_inputs(module, [state]):
        found = module(x)
    assert torch.equal(found, module(x))


@pytest.mark.parametrize("scheme", [ROUNDED, STATIC], ids=str)
def test_gradients_pass_the_rounding_as_if_it_were_not_there(scheme: Scheme) -> None:
    module, state = one(scheme)
    if scheme is STATIC:
        state.input_scale = torch.tensor([0.05])
    x = torch.randn(1, 5, 16, requires_grad=True)
    with rounded_inputs(module, [state], straight_through=True):
        module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand_as(x))


def test_of_a_static_scale_that_learns_clipped_inputs_have_no_gradient() -> None:
    module, state = one(STATIC)
    state.input_scale = torch.tensor([0.01], requires_grad=True)
    x = torch.randn(1, 5, 16, requires_grad=True)
    with rounded_inputs(module, [state], straight_through=True):
        module(x).sum().backward()
    assert x.grad is not None and state.input_scale.grad is not None
    clipped = (x > 1.27) | (x < -1.28)
    assert clipped.any() and torch.equal(x.grad == 0, clipped)
