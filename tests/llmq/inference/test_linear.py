"""Packed layers of each kind: their layouts and casts, and the operators that they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import llmq
from llmq.formats.plain import CodebookWeight, Float8Weight, Int8Weight, IntWeight, LevelsWeight, Weight
from llmq.inference import linear
from llmq.inference.linear import CodebookLinear, IntLinear, LevelsLinear, quant_linear
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.int_linear import layouts
from tests.llmq.inference.test_transformers_hook import apart


def weights() -> list[Weight]:
    """One of each kind, [32, 64]."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (32, 8), generator=generator).to(torch.int32)
    codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=generator)
    packed = torch.randint(0, 256, (32 * 32,), dtype=torch.uint8, generator=generator)
    codebook = torch.linspace(-1, 1, 16)
    return [
        IntWeight(words, torch.full((32, 2), 0.1), None, 4, 64, 32),
        CodebookWeight(packed, torch.ones(32), codebook, None, None, 0.0, 32, 64, 64),
        Int8Weight(codes, torch.full((32, 1), 0.01), None),
        Float8Weight(codes.to(torch.float8_e4m3fn), torch.full((32, 1), 0.01), None),
    ]


def as_planes(layer: IntLinear) -> None:
    """As on a GPU, where Triton's kernels read it."""
    parts = layouts.pack("planes", layer.qweight, layer.scale, layer.zero, 4, 64, 32, layer.dtype)
    layer.layout = "planes"
    for name, part in zip(("qweight", "scale", "zero"), parts, strict=True):
        layer.register_buffer(name, part)


def test_planes_serve_both_half_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(layouts, "NAMES", (layouts.DENSE_BITS,))
    layer = quant_linear(weights()[0], torch.ones(32), torch.bfloat16)
    assert isinstance(layer, IntLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    wanted = quant_linear(weights()[0], torch.ones(32), torch.float32)(x)
    monkeypatch.undo()
    as_planes(layer)
    scale = layer.scale
    model = nn.Sequential(layer)
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        model.to(dtype)
        assert (layer.layout, layer.dtype, layer.scale.dtype) == ("planes", dtype, torch.float32)
        assert torch.equal(layer.scale, scale)
        assert layer.bias.dtype == dtype
        if not torch.cuda.is_available():  # Triton's interpreter
            assert apart(layer(x.to(dtype)).float(), wanted) < 1e-2
    with pytest.raises(llmq.LlmqError, match="packed as planes for torch.float16; .* only partly moved: load .* again"):
        model.to(torch.float32)
    model.to("meta")


def test_an_operator_is_called_only_where_it_does_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager inference calls the kernels directly; gradients, and dispatch modes, need the operator."""
    pytest.importorskip("triton")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    monkeypatch.setattr(layouts, "NAMES", (layouts.DENSE_BITS,))
    layer = quant_linear(weights()[0], torch.ones(32), torch.bfloat16)
    monkeypatch.undo()
    assert isinstance(layer, IntLinear)
    as_planes(layer)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    real, calls = linear.planes_linear, []
    monkeypatch.setattr(linear, "planes_linear", lambda *given: calls.append(1) or real(*given))
    y = layer(x)
    assert calls == [1]
    with Seen():
        assert torch.equal(layer(x), y)
    assert calls == [1] and any("int_linear" in name for name in names)
    x.requires_grad_()
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()
    assert calls == [1] and x.grad is not None
    # A buffer that was replaced is noticed.
    layer.register_buffer("scale", layer.scale * 2)
    with torch.no_grad():
        assert not torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["blocks", "levels"])
def test_codebooks_as_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up by the kernels of integers, in Triton's interpreter: what the plain operators give."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    words = torch.randint(-(1 << 31), 1 << 31, (32, 8), dtype=torch.int64).to(torch.int32)
    weight = weights()[1] if kind == "blocks" else LevelsWeight(words, torch.randn(32, 16), 4, 64)
    layer = quant_linear(weight, torch.ones(32), torch.bfloat16)
    assert isinstance(layer, CodebookLinear | LevelsLinear)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = layer(x).float()
    monkeypatch.setattr(codebooks, "usable", lambda *_: True)
    layer = quant_linear(weight, torch.ones(32), torch.bfloat16)
    assert layer.layout == "planes" and "planes" in str(layer)
    assert apart(layer(x).float(), wanted) < 1e-2
    x.requires_grad_()
    assert apart(layer(x).detach().float(), wanted) < 1e-2
    layer.to(torch.float16)
    assert apart(layer(x.detach().half()).float(), wanted) < 1e-2
    with pytest.raises(llmq.LlmqError, match="packed as planes"):
        layer.to(torch.float32)
