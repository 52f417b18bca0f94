"""QuantLinear where other code takes it for an ordinary linear layer: its weight's dtype, inputs, casts, notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from llmq.formats.plain import Float8Weight
from llmq.inference.linear import quant_linear
from llmq.inference.transformers_hook import use_kernels
from llmq_kernels import backend
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.float8_linear import scaled
from tests.llmq.inference.test_linear import weights
from tests.llmq.inference.test_transformers_hook import apart, layers
from tests.llmq.written import Case, config, gptq, save


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
    monkeypatch.setattr(scaled, "_way", lambda *_: "rows")
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


@pytest.mark.parametrize(("way", "rows"), [("rows", 32), (None, 32), ("rows", 24)])
def test_products_of_float8_that_torch_has_not_are_noted(
    way: str | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And scales are as its product takes them."""
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "_too_old", lambda device: None)
    monkeypatch.setattr(scaled, "_way", lambda *_: way)
    with FakeTensorMode():
        codes = torch.empty(rows, 64, dtype=torch.float8_e4m3fn, device="cuda")
        scale = torch.empty(rows, 1, dtype=torch.bfloat16, device="cuda")
        layer = quant_linear(Float8Weight(codes, scale, None), None, torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    told = None if way is None else "multiples of 16"
    assert layer.notes == {} if (way, rows) == ("rows", 32) else (told or "no float8") in layer.notes["float8"]
