"""How much of a tune is left: the figures of one weight, and what they are computed from."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from llmq.adapters.survival import retention, rounded, scales, transforms
from llmq.grids.scheme import Scheme


def test_the_measure_at_its_ends() -> None:
    exact, delta = torch.randn(8, 32), torch.randn(8, 32) * 0.01
    assert retention(exact, exact, delta)[:2] == (1.0, None)
    survived, snr, _ = retention(exact - delta, exact, delta)  # the base: nothing of the change is there
    assert survived == pytest.approx(0, abs=1e-3) and snr == pytest.approx(1, rel=1e-3)


def test_scales_of_a_transform_are_found() -> None:
    exact = torch.randn(96, 128)
    rows, columns = torch.rand(96, 1) + 0.5, torch.rand(1, 128) * 4 + 0.1
    found = scales(exact * rows * columns + torch.randn(96, 128) * 1e-3, exact)
    assert torch.allclose(found, rows * columns, rtol=5e-3)


def test_the_yardstick_is_rounding_from_the_smallest_to_the_largest_value() -> None:
    weight = torch.randn(4, 64)
    found = rounded(weight, Scheme(4, 32))
    groups = weight.view(4, 2, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5  # the sixteenth level may go to either side
    apart = float((found.view(4, 2, 32) - groups).norm())
    plain = float(((groups / scale).round().clamp(-8, 7) * scale - groups).norm())
    assert found.dtype == torch.float32 and apart == pytest.approx(plain, rel=0.15)
    assert all(len(row.unique()) <= 16 for row in found.view(8, 32))


def test_which_methods_rescale_weights() -> None:
    assert transforms("awq") and transforms("smoothquant")
    assert not transforms("gptq") and not transforms("signround")
