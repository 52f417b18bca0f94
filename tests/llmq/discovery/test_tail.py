"""What follows the last block: run alone on its output, it gives the logits of stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery import blocks as discover
from llmq.discovery import tail as module
from llmq.discovery.parameters import assign
from llmq.discovery.tail import Tail, find_tail
from llmq.errors import LlmqError
from tests.architectures import checks, tiny

WIDTH = 6
KINDS = {
    "llama": {"model.norm.weight", "lm_head.weight"},
    "gemma2": {"model.norm.weight", "model.embed_tokens.weight"},  # a tied head, and a limit of the logits
    "granite": {"model.norm.weight", "lm_head.weight"},  # divides the logits
    "camembert": {"lm_head.dense.weight", "lm_head.layer_norm.weight"},  # layers of its own between norm and head
    "mamba": {"backbone.norm_f.weight"},
}


def with_tail(name: str, folder: Path) -> tuple[Any, Tail, str]:
    """A tiny stock model, the tail of the same model built without memory, and the name of the last block."""
    model = discover.build(tiny.make(name, folder), torch.float32)
    structure = discover.find(model)
    tail = find_tail(model, [model.get_submodule(block.name) for block in structure.blocks])
    real = checks.stock(folder)
    parameters = dict(real.named_parameters(remove_duplicate=False))
    for parameter in tail.parameters:
        assign(model, parameter, parameters[parameter].detach())
    return real, tail, structure.blocks[-1].name


@pytest.mark.parametrize("name", KINDS)
def test_gives_the_logits_of_the_whole_model(name: str, tmp_path: Path) -> None:
    real, tail, last = with_tail(name, tmp_path)
    assert KINDS[name] <= set(tail.parameters)
    seen: list[Tensor] = []
    real.get_submodule(last).register_forward_hook(
        lambda module, given, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        want = real(input_ids=tiny.tokens(), use_cache=False).logits
    hidden = seen[0].requires_grad_()
    tail.check(hidden[:1])
    have = tail.logits(hidden)
    assert torch.equal(have, want) and tail.rows == want.shape[-1]
    (gradient,) = torch.autograd.grad(have[0].square().sum(), hidden)
    assert gradient[0].any() and not gradient[1].any()
    assert all(p.device.type == "meta" for n, p in tail.model.named_parameters() if n not in tail.parameters)


GAINS = {
    "llama": {"model.norm.weight"},
    "gemma2": {"model.norm.weight"},
    "camembert": {"lm_head.layer_norm.weight"},
    "gpt_neox": {"gpt_neox.final_layer_norm.weight"},
}


@pytest.mark.parametrize("name", GAINS)
def test_finds_what_values_are_multiplied_by(name: str, tmp_path: Path) -> None:
    model = discover.build(tiny.make(name, tmp_path), torch.float32)
    tail = find_tail(model, [model.get_submodule(block.name) for block in discover.find(model).blocks])
    assert tail.gains == GAINS[name] and (tail.rows, tail.width) == (tiny.VOCAB, 64)


@pytest.mark.parametrize("name", ["gemma3n_text", "prophetnet", "cpmant", "xlnet"])
def test_states_with_other_axes_are_taken_whole(name: str, tmp_path: Path) -> None:
    """Streams side by side, of n-grams behind each other, with a prompt before them, tokens before windows."""
    real, tail, last = with_tail(name, tmp_path)
    seen: list[Tensor] = []
    real.get_submodule(last).register_forward_hook(
        lambda module, given, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    ids = tiny.tokens()
    with torch.no_grad():
        want = real(input_ids=ids, use_cache=False).logits
        tail.settle(seen[0], ids.shape)
        assert not tail.apart and [*tail.pieces(seen[0].shape)] == [slice(None)]
        assert torch.allclose(tail.logits(seen[0], ids.shape), want, atol=1e-5)


def test_it_may_run_in_a_wider_dtype_than_the_model(tmp_path: Path) -> None:
    """With a tied embedding, which the blocks, in their own dtype, would get their input from."""
    model = discover.build(tiny.make("gemma2", tmp_path), torch.bfloat16)
    tail = find_tail(model, [model.get_submodule(block.name) for block in discover.find(model).blocks])
    real = dict(checks.stock(tmp_path).named_parameters())
    for name in tail.parameters:
        assign(model, name, real[name].detach().float())
    hidden = torch.randn(2, 5, 64)
    tail.check(hidden[:1])
    assert tail.logits(hidden).dtype == torch.float32


def test_tokens_are_computed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 16 * 2 * 5)
    for how, apart in (("usual", True), ("mean", False)):
        tail, hidden = tail_of(how), torch.randn(2, 12, WIDTH)
        assert [*tail.pieces(hidden.shape)] == [slice(None)]
        tail.settle(hidden, (2, 12))
        assert tail.apart == apart
    tail.apart = True
    assert [*tail.pieces(hidden.shape)] == [slice(0, 5), slice(5, 10), slice(10, 12)]


def test_logits_that_depend_on_embeddings_are_refused() -> None:
    with pytest.raises(LlmqError, match="more than the output of its last block"):
        tail_of("first").settle(torch.randn(2, 6, WIDTH), (2, 6))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Model(nn.Module):
    """how: what follows the last block."""

    def __init__(self, how: str = "usual") -> None:
        super().__init__()
        self.embed, self.layers, self.how = nn.Embedding(16, WIDTH), nn.ModuleList(nn.Linear(6, 6) for _ in "ab"), how
        self.head = nn.Linear(WIDTH, 16, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = first = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        if self.how == "fails":
            raise ValueError("no such thing")
        hidden = {"mean": hidden - hidden.mean(1, keepdim=True), "first": hidden + first}.get(self.how, hidden)
        logits = self.head(hidden)
        return hidden if self.how == "bare" else Output(logits)


def tail_of(how: str) -> Tail:
    with torch.device("meta"):
        model = Model(how).eval()
    tail = find_tail(model, [*model.layers])
    for name in tail.parameters:
        assign(model, name, torch.randn(model.get_parameter(name).shape))
    return tail


def test_only_the_parameters_after_the_last_block_are_read() -> None:
    tail = tail_of("usual")
    hidden = torch.randn(2, 5, WIDTH)
    tail.check(hidden[:1])
    assert tail.parameters == ("head.weight",)
    assert torch.equal(tail.logits(hidden), hidden @ tail.model.get_parameter("head.weight").T)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_logits_that_depend_on_more_than_their_own_token_are_refused(how: str) -> None:
    with pytest.raises(LlmqError, match="depend on more"):
        tail_of(how).check(torch.randn(1, 6, WIDTH))


@pytest.mark.parametrize(("how", "told"), [("bare", "no logits"), ("fails", "no such thing")])
def test_a_model_without_logits_has_no_tail(how: str, told: str) -> None:
    with pytest.raises(LlmqError, match=told):
        tail_of(how)
