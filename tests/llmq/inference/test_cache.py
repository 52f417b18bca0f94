"""A simulated cache, against its arithmetic written out; scales that do not belong to a model are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq.grids.cache import Cache
from llmq.inference.cache import simulate
from tests.architectures import tiny
from tests.llmq.refusal import refused


@pytest.mark.parametrize("name", ["fp8", "fp8-head", "int8", "int8-head"])
def test_a_cache_holds_rounded_keys_and_values(name: str, tiny_model: Path) -> None:
    cache, ids = Cache.named(name), tiny.tokens(3, 16)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        exact = model(ids, use_cache=True).past_key_values.layers[0].keys
        assert simulate(model, tiny_model, cache) == 3
        found = model(ids, use_cache=True).past_key_values.layers[0].keys
        alone = model(ids[:1], use_cache=True).past_key_values.layers[0].keys
        assert torch.equal(model(ids).logits, model(ids, use_cache=True).logits)
    torch.testing.assert_close(alone, found[:1])
    top = exact.double().abs().amax((2, 3) if cache.heads else (1, 2, 3), keepdim=True)
    if cache.grid == "int":
        scale = top / 127.5
        expected = (exact.double() / scale).round().clamp(-128, 127) * scale
    else:
        scale = top / 448
        expected = (exact.double() / scale).float().to(torch.float8_e4m3fn).double() * scale
    # A value between two levels may go to the other one in float32.
    same = (found.double() - expected).abs() < 1e-5
    assert float(same.double().mean()) > 0.999 and not torch.equal(found, exact)


def test_scales_of_other_layers_are_refused(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    one = torch.ones(1), torch.ones(1)
    stored = {f"model.layers.{i}.self_attn": one for i in range(2)}
    refused(lambda: simulate(model, tiny_model, Cache("fp8"), stored), "model.layers.2.self_attn")
    stored = {f"text.layers.{i}.self_attn": one for i in range(3)}
    assert simulate(model, tiny_model, Cache("fp8"), stored) == 3
