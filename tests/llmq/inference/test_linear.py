"""QuantLinear where other code takes it for an ordinary linear layer: its weight's dtype, inputs, casts, notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import llmq
from llmq.formats.plain import CodebookWeight, Int8Weight, IntWeight, LevelsWeight, Weight
from llmq.inference import linear
from llmq.inference.linear import CodebookLinear, IntLinear, LevelsLinear, quant_linear
from llmq.inference.transformers_hook import use_kernels
from llmq_kernels import backend
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.int_linear import layouts
from tests.llmq.inference.test_transformers_hook import apart, layers
from tests.llmq.written import Case, config, gptq, save


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
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_cast_to_the_dtype_of_the_weight_keep_their_values(dtype: torch.dtype) -> None:
    """Models write `self.lm_head(h.to(self.lm_head.weight.dtype))`; an integer there would round h away."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for weight in weights():
        layer = quant_linear(weight, None, dtype)
        assert layer.weight.dtype == dtype
        assert layer.weight.device == x.device
        assert torch.equal(layer(x.to(layer.weight.dtype)), layer(x))
        for integers in (torch.int32, torch.uint8, torch.bool):
            with pytest.raises(TypeError, match="must be floating, not torch"):
                layer(x.to(integers))


def test_model_that_casts_to_the_dtype_of_a_weight(tmp_path: Path) -> None:
    """T5 casts what goes into the second layer of a block."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    dense = T5ForConditionalGeneration(T5Config(vocab_size=256, decoder_start_token_id=0, **sizes)).eval()
    state, rng, case = dict(dense.state_dict()), np.random.default_rng(0), Case("gptq", 4, 32, True)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            made, weight = gptq(rng, module.out_features, module.in_features, case)
            del state[f"{name}.weight"]
            state |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
            module.weight.data = torch.from_numpy(weight.astype(np.float32))
    for part in ("encoder", "decoder"):
        state.pop(f"{part}.embed_tokens.weight", None)
    dense.config.quantization_config = config(case)
    dense.config.to_json_file(tmp_path / "config.json")
    save(tmp_path, state)
    use_kernels()
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    finally:
        use_kernels(False)
    assert len(layers(model)) == 16
    tokens = torch.arange(5, 30)[None]
    with torch.inference_mode():
        found, wanted = (m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (model, dense))
    assert apart(found, wanted) < 1e-4


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


@pytest.mark.parametrize(
    "dtype, installed, reason",
    [
        (torch.float32, True, "inputs must be bfloat16 or float16, not torch.float32"),
        (torch.float16, False, "triton is not installed"),
        (torch.float16, True, None),
    ],
)
def test_plain_operator_on_a_gpu_is_noted(
    dtype: torch.dtype, installed: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codebooks and int8, which have no layouts to choose from; on a CPU they have kernels of their own."""
    monkeypatch.setattr(backend, "_installed", lambda: installed)
    monkeypatch.setattr(backend, "_too_old", lambda device: None)
    monkeypatch.setattr(codebooks, "usable", lambda *_: False)  # fake tensors cannot be packed
    for weight in weights()[1:]:
        assert not quant_linear(weight, None, dtype).notes
    stored = [(weight, {n: t for n, t in vars(weight).items() if isinstance(t, torch.Tensor)}) for weight in weights()]
    with FakeTensorMode():
        for weight, parts in stored[1:]:
            fake = {n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in parts.items()}
            layer = quant_linear(replace(weight, **fake), None, dtype)
            assert list(layer.notes) == (["triton"] if reason else [])
            assert reason is None or reason in layer.notes["triton"]
            layer.to(torch.float32)
            assert layer.notes
            layer.to("cpu")
            assert not layer.notes
