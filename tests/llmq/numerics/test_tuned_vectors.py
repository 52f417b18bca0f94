"""Codebooks and scales that are trained: their gradients against autograd in float64, and what can be stored."""

from __future__ import annotations

import pytest
import torch

from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight
from llmq.numerics.tuned_vectors import TunedVectors

TWO = Scheme(2, 8, grid="vq")


def weight(dtype: torch.dtype) -> VQWeight:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (5, 3, 2), generator=draw).to(torch.uint8)
    books, scale = torch.randn(2, 256, 8, generator=draw), torch.rand(5, generator=draw) + 0.5
    return VQWeight(codes, books.to(dtype), scale.to(dtype), TWO)


def test_gradients_are_those_of_autograd() -> None:
    q = weight(torch.float32)
    books, scale = q.codebooks.double().requires_grad_(), q.scale.double().requires_grad_()
    upstream = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    value = sum(books[m][q.codes[..., m].long()] for m in range(2)).flatten(1) * scale[:, None]
    want = torch.autograd.grad((value * upstream.double()).sum(), (books, scale))
    found = TunedVectors(q).gradients(upstream)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_move_what_is_used_and_the_start_is_exact(dtype: torch.dtype) -> None:
    q = weight(dtype)
    tuned, out = TunedVectors(q), torch.empty(5, 24, dtype=dtype)
    tuned.value(out)
    assert torch.equal(out, q.dequantize(dtype)) and torch.equal(tuned.quantized().codebooks, q.codebooks)
    wanted = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(30):
        tuned.value(out)
        losses.append(float((out.float() - wanted).square().sum()))
        tuned.step(out.float() - wanted, 0.05, 0.01)
    now = tuned.quantized()
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(now.codes, q.codes) and now.codebooks.dtype == now.scale.dtype == dtype
    assert torch.equal(now.codebooks[:, 3:], q.codebooks[:, 3:])
    assert bool((now.scale > 0).all())
