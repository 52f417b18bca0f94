"""Rounding activations, against compressed-tensors' own run-time arithmetic, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.activations import round_input, round_per_token, round_static, static_scale
from llmq.grids.nvfp4 import divisor_of
from llmq.grids.scheme import Activations, Scheme

GRIDS = ("int", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample(seed: int, dtype: torch.dtype) -> Tensor:
    """Inputs [2, 5, 48] whose tokens differ in size, one all zero, one with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 48, generator=generator) * torch.exp(2 * torch.randn(2, 5, 1, generator=generator))
    x[0, 1] = 0
    x[1, 2, 7] = 300
    return x.to(dtype)


def args(grid: str, dynamic: bool) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=8,
        type={"int": "int", "fp8": "float"}[grid],
        symmetric=True,
        strategy="token" if dynamic else "tensor",
        dynamic=dynamic,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS), st.sampled_from(DTYPES))
def test_per_token_as_compressed_tensors(seed: int, grid: str, dtype: torch.dtype) -> None:
    x, how = sample(seed, dtype), args(grid, True)
    scale, zero = compute_dynamic_scales_and_zp(x, how, torch.nn.Identity())
    got = round_per_token(x, grid)
    assert got.dtype == dtype and torch.equal(got, fake_quantize(x, scale, zero, how))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS), st.sampled_from(DTYPES), st.floats(0.01, 3))
def test_static_as_compressed_tensors(seed: int, grid: str, dtype: torch.dtype, share: float) -> None:
    x, how = sample(seed, dtype), args(grid, False)
    scale = torch.tensor([static_scale(share * float(x.abs().max()), grid)], dtype=dtype)
    zero = torch.zeros(1, dtype=how.zp_dtype)
    got = round_static(x, scale, grid)
    assert got.dtype == dtype and torch.equal(got, fake_quantize(x, scale, zero, how))


DYNAMIC, FP8 = Activations(), Activations(grid="fp8")
PRESETS = {
    "NVFP4": Scheme(4, 16, grid="nvfp4", activations=Activations(dynamic=False)),
    "MXFP4": Scheme(4, 32, grid="mxfp4", activations=DYNAMIC),
    "MXFP6A8": Scheme(6, 32, grid="mxfp6", activations=DYNAMIC),
    "MXFP8": Scheme(8, 32, grid="mxfp8", activations=DYNAMIC),
    "FP8_BLOCK": Scheme(8, 128, grid="fp8-block", activations=DYNAMIC),
    "MXFP4XFP8": Scheme(4, 32, grid="mxfp4", activations=FP8),
    "W4AFP8": Scheme(4, 128, activations=FP8),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([*PRESETS]), st.sampled_from(DTYPES), st.floats(-30, 2))
def test_presets_as_compressed_tensors(seed: int, preset: str, dtype: torch.dtype, power: float) -> None:
    """Tokens of very different sizes, some of whose groups are 0, or have scales too small or too large to be stored.

    In float16 not all: where a largest magnitude is nearly the largest number, it rounds a scale up to infinity.
    """
    scheme = PRESETS[preset]
    if preset not in PRESET_SCHEMES:
        pytest.skip(f"this compressed-tensors has no {preset}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 256, generator=generator) * torch.exp(3 * torch.randn(2, 5, 1, generator=generator))
    x[0, 1], x[1, 2, 7] = 0, 300
    x = (x * 10 ** max(power, -7 if dtype == torch.float16 else power)).clamp(-5e4, 5e4).to(dtype)
    how = preset_name_to_scheme(preset, ["Linear"]).input_activations
    # Some values are clipped, as the power of two may be smaller than the share.
    static = static_scale(0.3 * float(x.abs().max()), scheme.grid) if preset == "NVFP4" else None
    shared = None if static is None else divisor_of(static)
    scale, zero = compute_dynamic_scales_and_zp(x, how, torch.nn.Identity(), global_scale=shared)
    want = fake_quantize(x, scale, zero, how, global_scale=shared)
    got = round_input(x, scheme, static)
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_do_not_touch_each_other(grid: str) -> None:
    """Also with two axes, as a server gives them."""
    x = sample(0, torch.float32)
    assert torch.equal(round_per_token(x.view(10, 48), grid).view_as(x), round_per_token(x, grid))


def test_by_hand() -> None:
    x = torch.tensor([[-127.5, 127.5, 63.0, 0.4, 0.6]])
    assert round_per_token(x, "int").tolist() == [[-128.0, 127.0, 63.0, 0.0, 1.0]]
    assert round_static(x, torch.tensor(2.0), "int").tolist() == [[-128.0, 128.0, 64.0, 0.0, 0.0]]
    x = torch.tensor([[448.0, -17.0, 0.01]])
    assert round_per_token(x, "fp8").tolist() == [[448.0, -16.0, 5 / 512]]
    assert round_static(x, torch.tensor(0.5), "fp8").tolist() == [[224.0, -16.0, 0.5 * 10 / 512]]
    assert (static_scale(255.0, "int"), static_scale(896.0, "fp8"), static_scale(0.0, "int")) == (2.0, 2.0, 1.0)


def test_refuses_other_grids() -> None:
    for call in (lambda: round_per_token(torch.ones(1, 2), "nf4"), lambda: static_scale(1.0, "nf4")):
        with pytest.raises(LlmqError, match="int or .* or mxfp8, not 'nf4'"):
            call()
