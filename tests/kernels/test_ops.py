"""The operators as torch sees them: schema, fakes, gradients, torch.compile, and errors instead of wrong numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmq_kernels.ops  # noqa: F401
from llmq_kernels.checks import check_device
from llmq_kernels.int8_linear import reference as int8_reference
from llmq_kernels.int_linear import layouts, reference
from llmq_kernels.int_linear.layouts import DENSE_BITS
from llmq_kernels.nf4_linear import reference as nf4_reference
from tests.kernels.weights import Plain, plain, tolerance

GROUPS = [32, 64, 128, 200]


def arguments(weight: Plain, x: Tensor, layout: str = DENSE_BITS, bias: Tensor | None = None) -> tuple[Any, ...]:
    """What int_linear takes."""
    out, width = weight.shape
    packed = layouts.pack(
        layout, weight.words, weight.scale, weight.zero, weight.bits, width, weight.group_size, x.dtype
    )
    return (x, *packed, bias, weight.bits, out, width, weight.group_size, layout)


def nf4(out: int, width: int, double: bool) -> tuple[Any, ...]:
    """What nf4_linear takes after x and before bias."""
    generator = torch.Generator().manual_seed(1)
    size = out * width
    blocks = -(-size // 64)
    packed = torch.randint(0, 256, (-(-size // 2),), dtype=torch.uint8, generator=generator)
    codebook = torch.linspace(-1, 1, 16)
    if not double:
        return packed, torch.rand(blocks, generator=generator), codebook, None, None, 0.0
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested = torch.rand(-(-blocks // 256), generator=generator)
    return packed, absmax, codebook, nested, torch.linspace(-1, 1, 256), 0.25


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_twin_is_the_float64_product(bits: int, group_size: int, symmetric: bool) -> None:
    weight = plain(11, 197, bits, group_size, symmetric=symmetric)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 197, generator=torch.Generator().manual_seed(0)).to(dtype)
        bias = torch.randn(11).to(dtype)
        exact = x.double().view(6, -1) @ weight.dense.t() + bias.double()
        allowed = tolerance(x.view(6, -1), weight.dense) + torch.finfo(dtype).eps * exact.abs()
        twin = reference.int_linear(x, weight.words, weight.scale, weight.zero, bias, bits, group_size)
        assert twin.dtype == dtype and twin.shape == (2, 3, 11)
        assert ((twin.double().view(6, -1) - exact).abs() <= allowed).all()
        assert torch.equal(torch.ops.llmq.int_linear(*arguments(weight, x, bias=bias)), twin)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [None, torch.randn(12)])
def test_opcheck(bias: Tensor | None) -> None:
    x = torch.randn(2, 3, 128, requires_grad=True)
    weight = plain(12, 128, 4, 32, symmetric=False, dtype=torch.float32)
    torch.library.opcheck(torch.ops.llmq.int_linear.default, arguments(weight, x, bias=bias))
    for double in (False, True):
        torch.library.opcheck(torch.ops.llmq.nf4_linear.default, (x, *nf4(12, 128, double), bias, 12, 128, 64))
    codes = torch.randint(-128, 128, (12, 128), dtype=torch.int8)
    for input_scale in (None, torch.tensor([0.03])):
        torch.library.opcheck(torch.ops.llmq.int8_linear.default, (x, codes, torch.rand(12, 1), input_scale, bias))
    grad = torch.randn(2, 3, 12)
    whole = arguments(weight, x)
    torch.library.opcheck(torch.ops.llmq.int_linear_grad.default, (grad, *whole[1:4], *whole[5:]))
    torch.library.opcheck(torch.ops.llmq.nf4_linear_grad.default, (grad, *nf4(12, 128, True), 12, 128, 64))
    torch.library.opcheck(torch.ops.llmq.int8_linear_grad.default, (grad, codes, torch.rand(12, 1)))


@pytest.mark.parametrize(("layout", "dtype"), [("planes", torch.bfloat16), ("int4pack", torch.bfloat16)])
def test_other_layouts_are_the_same_operator(layout: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 128).to(dtype).requires_grad_()
    weight = plain(12, 128, 4, 32, symmetric=False)
    whole = arguments(weight, x, layout)
    torch.library.opcheck(torch.ops.llmq.int_linear.default, whole)
    y = torch.ops.llmq.int_linear(*whole)
    exact = x.detach().view(6, 128).double() @ weight.dense.t()
    assert ((y.detach().view(6, 12).double() - exact).abs() <= tolerance(x.detach().view(6, 128), weight.dense)).all()
    y.sum().backward()
    assert x.grad is not None
    expected = weight.dense.sum(0).expand(2, 3, 128)
    torch.testing.assert_close(x.grad.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.slow
def test_int8_on_triton_is_the_same_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq_kernels.int8_linear.operator.on_triton", lambda x: True)
    x = torch.randn(2, 3, 128).bfloat16().requires_grad_()
    weight = torch.randint(-128, 128, (12, 128), dtype=torch.int8)
    scale = torch.rand(12, 1)
    torch.library.opcheck(torch.ops.llmq.int8_linear.default, (x, weight, scale, None, None))
    with torch.no_grad():
        got = torch.ops.llmq.int8_linear(x, weight, scale, None, None)
        torch.testing.assert_close(got, int8_reference.int8_linear(x, weight, scale))


def test_nothing_chooses_the_interpreter() -> None:
    name, reasons = layouts.choose(torch.device("cpu"), torch.bfloat16, 4, 64, 128, 32)
    assert name == "int4pack" and not reasons
    name, reasons = layouts.choose(torch.device("cpu"), torch.float32, 8, 64, 128, 32)
    assert name == DENSE_BITS and "up to 4 bits" in reasons["int4pack"]


def test_gradients_are_those_of_autograd_through_the_twin() -> None:
    x = torch.randn(5, 96)
    bias = torch.randn(7)
    weight = plain(7, 96, 3, 32, symmetric=False, dtype=torch.float32)
    codes = torch.randint(-128, 128, (7, 96), dtype=torch.int8)
    scale = torch.rand(7, 1)
    code = nf4(7, 96, True)

    def gradients(product: Any) -> tuple[Tensor, Tensor]:
        inputs = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        (product(*inputs) ** 2).sum().backward()
        assert inputs[0].grad is not None and inputs[1].grad is not None
        return inputs[0].grad, inputs[1].grad

    pairs = [
        (
            lambda x, b: torch.ops.llmq.int_linear(*arguments(weight, x, bias=b)),
            lambda x, b: reference.int_linear(x, weight.words, weight.scale, weight.zero, b, 3, 32),
        ),
        (
            lambda x, b: torch.ops.llmq.nf4_linear(x, *code, b, 7, 96, 64),
            lambda x, b: nf4_reference.nf4_linear(x, *code, b, 7, 64),
        ),
        (
            lambda x, b: torch.ops.llmq.int8_linear(x, codes, scale, None, b),
            lambda x, b: int8_reference.int8_linear(x, codes, scale, None, b),
        ),
    ]
    for operator, twin in pairs:
        for got, expected in zip(gradients(operator), gradients(twin), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_weight_has_no_gradient() -> None:
    weight = plain(7, 64, 4, 32, dtype=torch.float32)
    x = torch.randn(1, 64)
    with pytest.raises(NotImplementedError, match="scale of a low-bit weight is frozen"):
        torch.ops.llmq.int_linear(x, weight.words, weight.scale.requires_grad_(), None, None, 4, 7, 64, 32, DENSE_BITS)


def test_int8_twin_is_the_simulation_that_quantizers_optimize() -> None:
    from llmq.grids.activations import round_per_token, round_static

    codes = torch.randint(-128, 128, (9, 64), dtype=torch.int8)
    scale = torch.rand(9, 1)
    x = torch.randn(4, 64)
    x[2] = 0
    got = torch.ops.llmq.int8_linear(x, codes, scale, None, None)
    dense = codes.double() * scale.double()
    torch.testing.assert_close(got.double(), round_per_token(x, "int").double() @ dense.t(), rtol=1e-5, atol=1e-5)
    fixed = torch.tensor([0.02])
    got = torch.ops.llmq.int8_linear(x, codes, scale, fixed, None)
    torch.testing.assert_close(got.double(), round_static(x, fixed, "int").double() @ dense.t(), rtol=1e-5, atol=1e-5)


def test_torch_compile_runs_the_operator_whole() -> None:
    weight = plain(16, 64, 4, 32, dtype=torch.float32)
    whole = arguments(weight, torch.randn(3, 64))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(x: Tensor) -> Tensor:
        return torch.ops.llmq.int_linear(x.relu(), *whole[1:]).sum(-1)

    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), torch.ops.llmq.int_linear(x.relu(), *whole[1:]).sum(-1))


def test_no_rows() -> None:
    weight = plain(16, 64, 4, 32)
    empty = torch.randn(2, 0, 64).bfloat16()
    assert torch.ops.llmq.int_linear(*arguments(weight, empty)).shape == (2, 0, 16)


def test_misfits_are_errors_that_say_what_was_expected() -> None:
    weight = plain(12, 64, 4, 32)
    good = arguments(weight, torch.randn(2, 64).bfloat16())

    def refuses(error: type[Exception], match: str, *args: Any) -> None:
        with pytest.raises(error, match=match):
            torch.ops.llmq.int_linear(*args)

    refuses(ValueError, r"takes inputs \[..., 64\], not \[2, 63\]", torch.randn(2, 63).bfloat16(), *good[1:])
    refuses(TypeError, "must be float32, bfloat16 or float16, not torch.int64", torch.ones(2, 64).long(), *good[1:])
    refuses(ValueError, r"bias must be \[12\], not \[11\]", *good[:4], torch.randn(11), *good[5:])
    with pytest.raises(ValueError, match="the weight is on meta, the input on cpu: move the model"):
        check_device(torch.ones(1), torch.ones(1, device="meta"), "the weight")

    def unfit(error: type[Exception], match: str, **changed: Any) -> None:
        plain_form = {"words": weight.words, "scale": weight.scale, "zero": weight.zero, "bits": 4, "in_features": 64}
        with pytest.raises(error, match=match):
            layouts.pack(DENSE_BITS, **(plain_form | {"group_size": 32, "dtype": torch.bfloat16} | changed))

    unfit(ValueError, r"words must be \[12, 6\], not \[12, 8\]", bits=3)
    unfit(ValueError, r"scale must be \[12, 1\], not \[12, 2\]", group_size=64)
    unfit(TypeError, "words must be torch.int32, not torch.int64", words=weight.words.long())
    unfit(TypeError, "scale must be", scale=weight.scale.to(torch.int32))
    unfit(ValueError, r"zero must be \[12, 2\]", zero=torch.zeros(12, 1, dtype=torch.int8))
    unfit(ValueError, "2, 3, 4 and 8 bits, not 5", bits=5)


@pytest.mark.parametrize("layout", [DENSE_BITS, "planes", "int4pack"])
def test_a_weight_that_does_not_fit_itself_is_an_error(layout: str) -> None:
    """What a layout's pack did not return would be read past its end."""
    x = torch.randn(2, 256).bfloat16()
    weight = plain(64, 256, 4, 64, symmetric=False)
    _, packed, scale, zero, bias, bits, out, width, group, name = arguments(weight, x, layout)
    product = torch.ops.llmq.int_linear
    product(x, packed, scale, zero, bias, bits, out, width, group, name)
    half = torch.cat([scale, scale])[: scale.shape[0] // 2 or 1]
    for wrong in (
        (x, packed[: out // 2], scale, zero, bias, bits, out, width, group, name),
        (x, packed, half, zero, bias, bits, out, width, group, name),
        (x, packed, scale.to(torch.int32), zero, bias, bits, out, width, group, name),
        (x, packed, scale, zero, bias, bits, 2 * out, width, group, name),
        (x, packed.float(), scale, zero, bias, bits, out, width, group, name),
    ):
        with pytest.raises((TypeError, ValueError), match=r"must be|needs packed"):
            product(*wrong)
    if layout != "int4pack":  # its group is that of its scales
        with pytest.raises(ValueError, match="scale must be"):
            product(x, packed, scale, zero, bias, bits, out, width, 2 * group, name)
        with pytest.raises(ValueError, match="must be"):
            product(x, packed, scale, zero, bias, 2, out, width, group, name)


@pytest.mark.parametrize("input_scale", [None, torch.tensor([0.02])])
@pytest.mark.parametrize("triton", [False, True])
def test_what_is_no_number_stays_none(
    input_scale: Tensor | None, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq_kernels.int8_linear.operator.on_triton", lambda x: triton)
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = torch.nan
    y = torch.ops.llmq.int8_linear(x, torch.ones(8, 64, dtype=torch.int8), torch.rand(8, 1), input_scale, None)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_int8_gradients_are_summed_in_float32() -> None:
    weight = torch.randint(-128, 128, (4096, 1024), dtype=torch.int8)
    scale = torch.rand(4096, 1)
    grad = torch.randn(2, 4096).bfloat16()
    got = torch.ops.llmq.int8_linear_grad(grad, weight, scale).double()
    exact = grad.double() @ (weight.double() * scale.double())
    assert (
        got - exact
    ).norm() / exact.norm() < 0.003  # three roundings of 0.0017: of weights, of a slab's product, of the sum


def test_unfit_nf4_and_int8_are_errors() -> None:
    x = torch.randn(2, 64)
    packed, absmax, codebook, *rest = nf4(8, 64, False)
    with pytest.raises(ValueError, match=r"packed must be \[256\], not \[255\]"):
        torch.ops.llmq.nf4_linear(x, packed[:-1], absmax, codebook, *rest, None, 8, 64, 64)
    with pytest.raises(ValueError, match=r"absmax must be \[8\], not \[7\]"):
        torch.ops.llmq.nf4_linear(x, packed, absmax[:-1], codebook, *rest, None, 8, 64, 64)
    with pytest.raises(TypeError, match="absmax must be torch.float32, not torch.uint8"):
        torch.ops.llmq.nf4_linear(x, packed, absmax.byte(), codebook, *rest, None, 8, 64, 64)
    with pytest.raises(TypeError, match="weight must be torch.int8, not torch.uint8"):
        torch.ops.llmq.int8_linear(x, torch.zeros(8, 64, dtype=torch.uint8), torch.rand(8, 1), None, None)
    with pytest.raises(ValueError, match=r"scale must be \[8, 1\], not \[8\]"):
        torch.ops.llmq.int8_linear(x, torch.zeros(8, 64, dtype=torch.int8), torch.rand(8), None, None)
