"""QuantLinear where other code takes it for an ordinary linear layer: its weight's dtype, inputs, casts, notes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from llmq.loading import use_kernels
from llmq.modules import quant_linear
from llmq.reading.plain import CodebookWeight, Int8Weight, IntWeight, Weight
from tests.llmq.test_loading import apart, layers
from tests.llmq.written import Case, config, gptq, save


def weights(device: str = "cpu") -> list[Weight]:
    """One of each kind, [32, 64]."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (32, 8), generator=generator).to(torch.int32).to(device)
    codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=generator).to(device)
    packed = torch.randint(0, 256, (32 * 32,), dtype=torch.uint8, generator=generator).to(device)
    codebook = torch.linspace(-1, 1, 16).to(device)
    return [
        IntWeight(words, torch.full((32, 2), 0.1, device=device), None, 4, 64, 32),
        CodebookWeight(packed, torch.ones(32, device=device), codebook, None, None, 0.0, 32, 64, 64),
        Int8Weight(codes, torch.full((32, 1), 0.01, device=device), None),
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
