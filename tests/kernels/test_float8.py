"""FP8 weights and inputs: the rounding bit for bit, each way to multiply, and what cannot be multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401
from llmq.grids.activations import round_per_token, round_static
from llmq_kernels.float8_linear import dense, reference, scaled
from llmq_kernels.weights import PackedFloat8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KIND = torch.float8_e4m3fn
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STATIC = [None, 0.013]
HALF = [torch.bfloat16, torch.float16]
# Not "test_schema", which compares arguments by arithmetic that torch has not for float8.
CHECKS = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


def draw(rows: int, out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, PackedFloat8]:
    """Rows of very different sizes, one of zeros among them; a weight of all codes; scales of both signs."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-5, 3, rows).unsqueeze(1)
    if rows > 2:
        x[1] = 0
    codes = torch.randint(0, 256, (out, width), dtype=torch.uint8, generator=generator)
    codes[codes & 127 == 127] = 0
    scale = (torch.randn(out, 1, generator=generator) * 1e-4).bfloat16()
    return x.to(dtype), PackedFloat8(codes.view(KIND), scale, None)


def exact(x: Tensor, weight: PackedFloat8, bias: Tensor | None) -> Tensor:
    """The product of the rounded input, in float64; and of magnitudes, of which errors are shares."""
    levels, scale = reference.round_input(x, weight.input_scale)
    y = (levels.double() * scale.double()) @ (weight.packed.double() * weight.scale.double()).t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("static", STATIC)
def test_inputs_are_rounded_as_quantizers_and_stock_transformers_do(dtype: torch.dtype, static: float | None) -> None:
    """By the reference and the CPU's bits; by the kernel where there is one."""
    x, _ = draw(9, 1, 300, dtype)
    known = None if static is None else torch.tensor([static])
    expected = round_per_token(x, "fp8") if known is None else round_static(x, known, "fp8")
    levels, scale = reference.round_input(x, known)
    assert torch.equal(levels * scale, expected)
    narrow = torch.float32 if dtype == torch.float16 else dtype
    assert torch.equal(dense.round_input(x, known, narrow).to(dtype), expected)
    inputs = pytest.importorskip("llmq_kernels.triton.inputs")
    codes, steps = inputs.round_input(x.to(DEVICE), None if known is None else known.to(DEVICE), KIND)
    assert torch.equal(codes.cpu().to(dtype) * steps.cpu().to(dtype).unsqueeze(1), expected)


def test_every_code_and_the_middle_between_two_are_encoded() -> None:
    """Half to even, as torch converts; beyond the ends is clipped."""
    inputs = pytest.importorskip("llmq_kernels.triton.inputs")
    every = torch.arange(256, dtype=torch.uint8).view(KIND).float()
    every = every[every.isfinite()].sort().values
    x = torch.cat([every, (every[1:] + every[:-1]) / 2, every * 1.01, torch.tensor([500.0, -1e9])]).unsqueeze(0)
    codes, _ = inputs.round_input(x.to(DEVICE), torch.ones(1, device=DEVICE), KIND)
    assert torch.equal(codes.cpu().view(torch.uint8), x.clamp(-448, 448).to(KIND).view(torch.uint8))


@pytest.mark.parametrize("dtype", HALF + [torch.float32])
def test_codes_are_decoded_exactly(dtype: torch.dtype) -> None:
    """Subnormal ones, too, with scales that a shift's factor of 2¹²⁰ would overflow, and tiny ones."""
    every = torch.arange(256, dtype=torch.uint8).view(KIND)
    every = every[every.float().isfinite()].expand(3, -1).contiguous()
    scale = torch.tensor([[1e-3], [500.0], [2.0**-8]]).bfloat16()
    for some in (scale, scale[::2], scale.float() / 3):
        out = torch.empty(len(some), every.shape[1], dtype=dtype)
        dense.decode(every[: len(some)], some, out)
        assert torch.equal(out, (every[: len(some)].float() * some.float()).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 17, 130])
@pytest.mark.parametrize("static", STATIC)
def test_the_operator_is_the_product_of_what_was_rounded(dtype: torch.dtype, rows: int, static: float | None) -> None:
    x, weight = draw(rows, 33, 77, dtype)
    known, bias = None if static is None else torch.tensor([static]), torch.randn(33).to(dtype)
    weight = PackedFloat8(weight.packed, weight.scale, known)
    y = torch.ops.llmq.float8_linear(x, weight.packed, weight.scale, known, bias)
    twin = reference.float8_linear(x, weight.packed, weight.scale, known, bias)
    expected = exact(x, weight, bias)
    assert y.dtype == twin.dtype == dtype
    levels, scale = reference.round_input(x, known)
    sizes = (levels.double() * scale.double()).abs() @ (weight.packed.double() * weight.scale.double()).abs().t()
    # The result is rounded, and float16's below 6e-5 have fewer bits; float32 sums have errors of their terms.
    once = torch.finfo(dtype).eps * expected.abs() + (1e-7 if dtype == torch.float16 else 0.0)
    terms = sizes + bias.double().abs()
    assert ((twin.double() - expected).abs() <= once + 1e-6 * terms).all()
    # In bfloat16 inputs and weights are rounded to the product's dtype, too.
    rounded = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    assert ((y.double() - expected).abs() <= once + rounded * terms).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", ["rows", "whole"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_each_way_of_torch_s_product_is_rounded_once(dtype: torch.dtype, way: scaled.Way, rows: int) -> None:
    """On this CPU, where torch has them, too."""
    if not scaled.works(torch.device(DEVICE), dtype, way):
        pytest.skip("torch has no such product here")
    x, weight = draw(rows, 48, 96, dtype)
    for known, bias in ((None, None), (torch.tensor([0.5]), torch.randn(48).to(dtype))):
        weight = PackedFloat8(weight.packed, weight.scale, known)
        levels, scale = reference.round_input(x, known)
        steps = scale.float().expand(rows, 1).contiguous().view(-1)
        y = scaled.multiply(
            levels.to(KIND).to(DEVICE),
            steps.to(DEVICE),
            PackedFloat8(weight.packed.to(DEVICE), weight.scale.to(DEVICE), None),
            None if bias is None else bias.to(DEVICE),
            dtype,
            way,
        ).cpu()
        twin = reference.float8_linear(x, weight.packed, weight.scale, known, bias)
        assert y.dtype == dtype
        # Sums that cancel have float32's errors of their terms; and half a unit where these decide the rounding.
        torch.testing.assert_close(y, twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * float(twin.abs().max()))


def test_what_torch_multiplies_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def product(codes: Tensor, turned: Tensor, a: Tensor, b: Tensor, **options: object) -> Tensor:
        tried.append("rows" if a.numel() > 1 else "whole")
        if a.numel() > 1:
            raise RuntimeError("Only multiplication of row-major and column-major matrices is supported")
        return codes.float() @ turned.float()

    monkeypatch.setattr(torch, "_scaled_mm", product)
    scaled._way.cache_clear()
    device = torch.device("cpu")
    assert scaled.way_of(device, torch.bfloat16, 64, 64) is None and not tried
    assert not scaled.works(device, torch.bfloat16, "rows") and scaled.works(device, torch.bfloat16, "whole")
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: torch.zeros(32, 32))
    assert not scaled.works(device, torch.bfloat16, "whole")
    assert "multiples of 16" in (scaled.refusal(device, torch.bfloat16, 60, 64) or "")
    assert "no float8_e4m3fn" in (scaled.refusal(device, torch.bfloat16, 64, 64) or "")


@pytest.mark.parametrize("way", ["rows", "whole", None])
def test_the_operator_on_a_gpu_is_the_same(way: scaled.Way | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("llmq_kernels.float8_linear.operator.on_triton", lambda x: True)
    monkeypatch.setattr(scaled, "_way", lambda device, dtype: way)
    x, weight = draw(5, 32, 64, torch.bfloat16)
    if way is not None and not scaled.works(torch.device(DEVICE), x.dtype, way):
        pytest.skip("torch has no such product here")
    moved = x.view(1, 5, 64).to(DEVICE), weight.packed.to(DEVICE), weight.scale.to(DEVICE)
    y = torch.ops.llmq.float8_linear(*moved, None, None)[0].cpu()
    twin = reference.float8_linear(x, weight.packed, weight.scale)
    assert float((y - twin).double().norm() / twin.double().norm()) < 3 * 2.0**-9


def test_opcheck_and_gradients() -> None:
    _, weight = draw(3, 12, 64, torch.float32)
    x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(12, requires_grad=True)
    for known in (None, torch.tensor([0.03])):
        arguments = (x, weight.packed, weight.scale, known, bias)
        got = torch.autograd.grad((torch.ops.llmq.float8_linear(*arguments) ** 2).sum(), (x, bias))
        expected = torch.autograd.grad((reference.float8_linear(*arguments) ** 2).sum(), (x, bias))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    torch.library.opcheck(torch.ops.llmq.float8_linear.default, arguments, test_utils=CHECKS)
    arguments = (torch.randn(2, 3, 12), weight.packed, weight.scale)
    torch.library.opcheck(torch.ops.llmq.float8_linear_grad.default, arguments, test_utils=CHECKS)
    with pytest.raises(NotImplementedError, match="scale of a low-bit weight is frozen"):
        torch.ops.llmq.float8_linear(x, weight.packed, weight.scale.clone().requires_grad_(), None, None)


@pytest.mark.parametrize("known", [None, torch.tensor([0.02])])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(
    known: Tensor | None, kernel: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:
        pytest.importorskip("triton")
        monkeypatch.setattr("llmq_kernels.float8_linear.operator.on_triton", lambda x: True)
        if not scaled.works(torch.device(DEVICE), torch.bfloat16, "whole"):
            pytest.skip("torch has no such product here")
        monkeypatch.setattr(scaled, "_way", lambda device, dtype: "whole")
    device = DEVICE if kernel else "cpu"
    _, weight = draw(3, 16, 64, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = value
    moved = [None if part is None else part.to(device) for part in (x, weight.packed, weight.scale, known)]
    y = torch.ops.llmq.float8_linear(*moved, None)
    assert y[[0, 2]].isfinite().all()
    # A static scale clips what is infinite, as the quantizer's simulation does.
    assert y[1].isfinite().all() if known is not None and value == torch.inf else y[1].isnan().all()


def test_unfit_arguments_are_errors() -> None:
    x, weight = draw(2, 8, 64, torch.bfloat16)
    product = torch.ops.llmq.float8_linear
    with pytest.raises(TypeError, match="weight must be torch.float8_e4m3fn, not torch.int8"):
        product(x, weight.packed.view(torch.int8), weight.scale, None, None)
    with pytest.raises(ValueError, match=r"scale must be \[8, 1\], not \[8\]"):
        product(x, weight.packed, weight.scale.view(-1), None, None)
    with pytest.raises(ValueError, match=r"takes inputs \[..., 64\], not \[2, 63\]"):
        product(x[:, 1:], weight.packed, weight.scale, None, None)
