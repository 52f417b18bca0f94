"""What attention keeps, found by running: against transformers' own caches; what has no keys and values is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.discovery.keys import at_keys, dry_keys, find_keys
from tests.architectures import tiny
from tests.llmq.refusal import refused

# Heads that share keys; a fused weight, another name of the cache; layers with states, and experts; a cache as an
# argument without a name.
KINDS = ("llama", "gpt_neox", "qwen3_next", "git")


@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_are_those_that_fill_a_real_cache(kind: str) -> None:
    with tiny.quiet():
        model = tiny.model(kind)
        found = dry_keys(model)
        assert found == find_keys(model)
        ids = tiny.tokens(2, 12)
        with torch.no_grad():
            result = model(ids, use_cache=True)
        layers = [layer for layer in result.past_key_values.layers if getattr(layer, "keys", None) is not None]
        assert len(found) == len(layers)
        seen: list[tuple[Tensor, Tensor]] = []

        def see(module: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((keys, values))
            return keys, values

        with torch.no_grad(), at_keys(model, found, see, model.config):
            again = model(ids, use_cache=False)
    assert torch.equal(again.logits, result.logits)
    for keys, layer, one in zip(seen, layers, found, strict=True):
        assert torch.equal(keys[0], layer.keys) and torch.equal(keys[1], layer.values)
        assert (one.heads, one.width, one.values) == (keys[0].shape[1], keys[0].shape[3], keys[1].shape[3])


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_handed_on_is_what_the_model_computes_with(cached: bool) -> None:
    model = tiny.model("llama")
    ids = tiny.tokens(1, 6)

    def nothing(module: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, torch.zeros_like(values)

    def blind(block: torch.nn.Module, args: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(output[0]), *output[1:])

    with torch.no_grad():
        before = model(ids, use_cache=cached).logits
        with at_keys(model, dry_keys(model), nothing, model.config):
            found = model(ids, use_cache=cached).logits
        assert torch.equal(model(ids, use_cache=cached).logits, before)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(blind)
        assert torch.equal(found, model(ids).logits) and not torch.equal(found, before)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mamba2", ("keeps no keys and values",)),
        ("deepseek_v3", ("layers.0.self_attn", "latent")),
        ("gemma3n_text", ("layers.2.self_attn", "another layer")),
        ("deepseek_v4", ("one tensor as keys and values",)),
    ],
)
def test_what_keeps_something_else_is_refused(kind: str, words: tuple[str, ...]) -> None:
    if kind not in tiny.TYPES:
        pytest.skip("an older transformers")
    with tiny.quiet():
        refused(lambda: dry_keys(tiny.model(kind)), *words)
