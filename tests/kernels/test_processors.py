"""Float16 on a CPU: the same numbers on every processor, whatever its own float16 products do with small numbers.

A processor with float16 instructions is put in place of the one that is there: torch is said to know them, and every
float16 product takes subnormal numbers for zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmq_kernels.ops  # noqa: F401
from llmq_kernels import products
from llmq_kernels.backend import triton_refusal
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.int8_linear.operator import int8_linear_grad
from llmq_kernels.int_linear import int4pack, layouts, reference
from llmq_kernels.int_linear import operator as int_linear
from llmq_kernels.nf4_linear import cpu as nf4_cpu
from llmq_kernels.nf4_linear import operator as nf4_linear
from llmq_kernels.nf4_linear import reference as nf4_reference
from llmq_kernels.weights import PackedCodebook, PackedInt
from tests.kernels.weights import plain

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.linear, aten.matmul}
OUT, WIDTH, GROUP = 48, 128, 64


class Flushing(TorchDispatchMode):
    """Every product of float16 tensors takes subnormal numbers for zero; counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.products += any(isinstance(one, Tensor) and one.dtype == torch.float16 for one in args)
            args = tuple(flushed(one) if isinstance(one, Tensor) else one for one in args)
        return func(*args, **(kwargs or {}))


def flushed(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float16:
        return tensor
    return torch.where(tensor.abs() < torch.finfo(torch.float16).smallest_normal, torch.zeros_like(tensor), tensor)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flushing]:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    products._on_cpu.cache_clear()
    with Flushing() as mode:
        yield mode
    products._on_cpu.cache_clear()


def check(processor: Flushing, run: Callable[[Tensor], Tensor], dense: Tensor, rows: tuple[int, ...]) -> None:
    """dense: float64 [out, in]. The result is rounded to float16, and nothing before it; sums are float32's."""
    assert 0 < dense.abs().max() < torch.finfo(torch.float16).smallest_normal / 4
    for count in rows:
        x = (torch.randn(count, dense.shape[1], generator=torch.Generator().manual_seed(count)) * 1e3).half()
        got = run(x)
        exact = x.double() @ dense.t()
        sums = 8 * (dense.shape[1] + 1) ** 0.5 * 2.0**-24 * (x.double().abs() @ dense.abs().t())
        assert got.dtype == torch.float16 and got.abs().max() > 1e-3
        assert ((got.double() - exact).abs() <= 2.0**-11 * exact.abs() + sums + 2.0**-25).all(), count
    assert processor.products == 0


def small() -> Any:
    """A weight of 4 bits whose numbers float16 would hold in a few bits or not at all."""
    return plain(OUT, WIDTH, 4, GROUP, symmetric=False, dtype=torch.float32, factor=3e-5)


@pytest.mark.parametrize("layout", ["int4pack", layouts.DENSE_BITS, "planes"])
def test_integers(layout: str, processor: Flushing, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = small()
    if layout == "planes":
        if torch.cuda.is_available() or triton_refusal(torch.device("cpu")) is not None:
            pytest.skip("Triton is not interpreted here")
        from llmq_kernels.triton import config, tables

        monkeypatch.setattr(tables, "choose", lambda *_: config.Config("dense"))
    packed = layouts.pack(layout, weight.words, weight.scale, weight.zero, 4, WIDTH, GROUP, torch.float16)
    rest = (4, OUT, WIDTH, GROUP, layout)
    check(processor, lambda x: int_linear.int_linear(x, *packed, None, *rest), weight.dense, (1, 5, 60))
    check(processor, lambda grad: int_linear.int_linear_grad(grad, *packed, *rest), weight.dense.t(), (1, 5))


def test_the_twin(processor: Flushing) -> None:
    weight = small()
    stored = (weight.words, weight.scale, weight.zero, None, 4, GROUP)
    check(processor, lambda x: reference.int_linear(x, *stored), weight.dense, (1, 5, 60))


def codebook() -> tuple[tuple[Any, ...], Tensor]:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (OUT * WIDTH // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(OUT * WIDTH // 64, generator=generator) * 1e-5
    levels = torch.linspace(-1, 1, 16)
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1).long()
    dense = levels.double()[codes] * absmax.double().repeat_interleave(64)
    return (packed, absmax, levels, None, None, 0.0), dense.view(OUT, WIDTH)


def test_codebooks(processor: Flushing) -> None:
    weight, dense = codebook()
    sizes = (OUT, WIDTH, 64)
    check(processor, lambda x: nf4_linear.nf4_linear(x, *weight, None, *sizes), dense, (1, 5, 60))
    check(processor, lambda x: nf4_cpu.linear(x, PackedCodebook(*weight, *sizes), None), dense, (1, 5, 60))
    check(processor, lambda x: nf4_reference.nf4_linear(x, *weight, None, OUT, 64), dense, (1, 5, 60))
    check(processor, lambda grad: nf4_linear.nf4_linear_grad(grad, *weight, *sizes), dense.t(), (1, 5))


def test_codebooks_beyond_the_fused_kernel(processor: Flushing, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() or triton_refusal(torch.device("cpu")) is not None:
        pytest.skip("Triton is not interpreted here")
    from llmq_kernels.triton import config, tables

    monkeypatch.setattr(tables, "choose", lambda *_: config.Config("dense"))
    weight, dense = codebook()
    packed = codebooks.of_blocks(PackedCodebook(*weight, OUT, WIDTH, 64))
    check(processor, lambda x: int_linear.planes_linear(x, packed, None), dense, (1, 5, 60))


def test_the_gradient_of_8_bits(processor: Flushing) -> None:
    codes = torch.randint(-128, 128, (OUT, WIDTH), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(OUT, 1) * 1e-7
    dense = codes.double() * scale.double()
    check(processor, lambda grad: int8_linear_grad(grad, codes, scale), dense.t(), (1, 5))


def test_what_the_processor_would_have_made_of_it(processor: Flushing) -> None:
    """The stand-in does lose small numbers: what passes here passes because no float16 product was asked of it."""
    weight = small()
    x = torch.full((2, WIDTH), 1e3, dtype=torch.float16)
    assert torch.nn.functional.linear(x, weight.dense.half()).abs().max() == 0
    assert processor.products > 0


def test_bfloat16_goes_through_float32_only_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    for known, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        products._on_cpu.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        assert products.product_dtype(x) == dtype
        assert products.product_dtype(x.to("meta")) == torch.bfloat16
    products._on_cpu.cache_clear()


def test_int4pack_packed_for_bfloat16_serves_float16(processor: Flushing) -> None:
    """The scales are bfloat16 then, and are small without being subnormal."""
    weight = plain(OUT, WIDTH, 4, GROUP, symmetric=False, factor=3e-5)
    plain_form = PackedInt(weight.words, weight.scale, weight.zero, 4, OUT, WIDTH, GROUP)
    packed = int4pack.pack(plain_form, torch.bfloat16)
    check(processor, lambda x: int4pack.linear(x, packed, None), weight.dense, (1, 60))
