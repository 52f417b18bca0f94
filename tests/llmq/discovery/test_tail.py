"""The tail of a model, run alone: the model's own logits, whatever it is made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery import tail as module
from llmq.discovery.blocks import find
from llmq.discovery.tail import find_tail, tokens_apart, zeros_outside
from tests.architectures import tiny
from tests.llmq.refusal import refused

IDS = torch.randint(10, 200, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "parameters", "gains"),
    [
        ("llama", {"model.norm.weight", "lm_head.weight"}, {"model.norm.weight"}),
        ("gemma2", {"model.norm.weight", "model.embed_tokens.weight"}, {"model.norm.weight"}),
        ("gpt_neox", {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "lm_head.weight"},
         {"gpt_neox.final_layer_norm.weight"}),
        ("gpt2", {"transformer.ln_f.weight", "transformer.ln_f.bias", "transformer.wte.weight"},
         {"transformer.ln_f.weight"}),
        ("cohere", {"model.norm.weight", "model.embed_tokens.weight"}, {"model.norm.weight"}),
    ],
)  # fmt: skip
def test_it_is_the_models_own(
    kind: str, parameters: set[str], gains: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft limits, scaled logits and tied embeddings too; some tokens at a time too."""
    model = tiny.model(kind)
    blocks = [model.get_submodule(block.name) for block in find(on_meta(kind)).blocks]
    seen: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda *a: seen.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
    with torch.no_grad():
        wanted = model(IDS).logits
    hook.remove()
    empty = on_meta(kind)
    found = find_tail(empty, [empty.get_submodule(block.name) for block in find(empty).blocks], IDS)
    assert set(found.parameters) == parameters and found.gains == gains
    assert (found.vocabulary, found.width) == (tiny.VOCAB, 64)
    found.model, found.blocks = model, blocks
    with torch.no_grad():
        assert torch.allclose(found.logits(IDS, seen[0]), wanted, atol=1e-5)
        assert torch.allclose(found.logits(IDS[:, 3:7], seen[0][:, 3:7]), wanted[:, 3:7], atol=1e-5)
    assert tokens_apart(found, IDS, seen[0])
    monkeypatch.setattr(module, "PIECE", tiny.VOCAB * 2 * 5)
    assert [*found.pieces(seen[0].shape)] == [slice(None)]
    found.apart = True
    assert [*found.pieces(seen[0].shape)] == [slice(0, 5), slice(5, 10), slice(10, 12)]


def on_meta(kind: str) -> nn.Module:
    """A tiny model without memory for its parameters."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), tiny.quiet():
        model = AutoModelForCausalLM.from_config(tiny.config(kind), dtype=torch.float32, attn_implementation="eager")
    model.tie_weights()
    return model.eval()


class Model(nn.Module):
    """Two blocks, and a tail in which tokens meet, or that returns no logits."""

    def __init__(self, meet: bool = True, logits: bool = True) -> None:
        super().__init__()
        self.meet, self.logits = meet, logits
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        x = self.head(x.cumsum(1) if self.meet else x)
        return SimpleNamespace(logits=x if self.logits else x.mean(1))


@pytest.mark.parametrize("meet", [True, False])
def test_tokens_that_meet_in_the_tail_are_noticed(meet: bool) -> None:
    model = Model(meet).to("meta")
    blocks = [*model.blocks]
    found = find_tail(model, blocks, IDS[:, :4] % 32)
    assert found.parameters == ("head.weight",) and not found.gains
    torch.manual_seed(0)
    model.head.weight = nn.Parameter(torch.randn(32, 8))
    with zeros_outside(model, blocks):
        assert tokens_apart(found, IDS % 32, torch.randn(2, 12, 8)) != meet
    assert model.embedding.weight.is_meta


def test_a_model_without_logits_is_refused() -> None:
    model = Model(logits=False).to("meta")
    refused(lambda: find_tail(model, [*model.blocks], IDS % 32), "no logits for every token")
