"""Weights whose products decide which experts a token goes to: found by following values, in whatever form they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from llmq.discovery.blocks import build, find
from llmq.discovery.reasons import Kind
from llmq.discovery.routers import follow_products
from tests.llmq import mixtures

# By the source of transformers' modeling files, per block of four; () where the block is dense.
ROUTERS: dict[str, list[str]] = {
    "qwen3_moe": ["mlp.gate"] * 4,
    "mixtral": ["mlp.gate"] * 4,
    "gpt_oss": ["mlp.router"] * 4,
    "granitemoe": ["block_sparse_moe.router"] * 4,
    "phimoe": ["mlp.router"] * 4,  # chooses by max, once per expert
    "hunyuan_v1_moe": ["mlp.gate.wg"] * 4,
    "afmoe": ["", *["mlp.router.gate"] * 3],
    "deepseek_v3": ["", "", "", "mlp.gate"],  # groups of experts are chosen first
    "jamba": ["", "feed_forward.router"] * 2,
    "nemotron_h": ["", "mixer.gate", "", ""],
    "qwen2_moe": ["mlp.gate"] * 4,  # beside a gate of the shared expert, which chooses nothing
    "longcat_flash": ["mlp.router.classifier"] * 4,
    "llama4_text": ["feed_forward.router"] * 4,  # no choice enters its experts: rows are multiplied by 0
    "dbrx": ["ffn.router.layer"] * 4,
    "inkling_text": ["mlp.gate"] * 4,
    "deepseek_v4": ["", "", "mlp.gate", "mlp.gate"],  # by token id at first; its attention chooses among tokens, too
}
LINEAR = ("phimoe", "hunyuan_v1_moe", "afmoe", "longcat_flash", "llama4_text", "dbrx")


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_of_real_types(kind: str) -> None:
    for block, want in zip(mixtures.structure(kind).blocks, ROUTERS[kind], strict=True):
        left = {name.removeprefix(f"{block.name}."): reason for name, reason in block.left.items()}
        found = {name for name, reason in left.items() if reason.kind is Kind.ROUTER}
        assert found == ({f"{want}.weight"} if want else set())
        assert not {w.view.parameter for w in block.weights} & found


def test_every_layer_of_a_router_is_left_alone() -> None:
    """zaya's has four, whose values reach the block's output through the choices and weights of experts only."""
    for block in mixtures.structure("zaya").blocks:
        left = {name.removeprefix(f"{block.name}.") for name, r in block.left.items() if r.kind is Kind.ROUTER}
        inner = {f"mlp.gate.router_mlp.{name}.weight" for name in ("fc1", "fc2", "out_proj")}
        assert left == inner | {"mlp.gate.down_proj.weight"}
        assert {w.name.rpartition(".")[2] for w in block.weights} == {"o_proj", "q_proj", "k_proj", "v_proj_current"}


@pytest.mark.parametrize("kind", LINEAR)
def test_some_of_them_are_linear_modules(kind: str) -> None:
    """Which would be quantized if nothing followed their values."""
    from tests.architectures import tiny

    model = tiny.model(kind)
    block = mixtures.structure(kind).blocks[-1]
    assert isinstance(model.get_submodule(f"{block.name}.{ROUTERS[kind][-1]}"), nn.Linear)


def test_routers_of_a_type_with_two_kinds_of_experts_in_a_block() -> None:
    for block in mixtures.structure("jetmoe").blocks:
        found = {name for name, reason in block.left.items() if reason.kind is Kind.ROUTER}
        assert found == {f"{block.name}.{n}.router.layer.weight" for n in ("mlp", "self_attention.experts")}


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_next"])
def test_the_gate_of_a_shared_expert_is_left_alone_for_its_size(kind: str) -> None:
    for block in mixtures.structure(kind).blocks:
        assert block.left[f"{block.name}.mlp.shared_expert_gate.weight"].kind is Kind.SMALL


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_a_dense_block_has_none(kind: str) -> None:
    dense = [b for b in mixtures.structure(kind).blocks if b.experts is None]
    assert dense and not [r for b in dense for r in b.left.values() if r.kind is Kind.ROUTER]


def test_a_weight_that_the_experts_output_feeds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """nemotron_h with latent experts: their sum is projected back to the width of the hidden states."""
    from tests.architectures import tiny

    config = tiny.config("nemotron_h")
    config.moe_latent_size = 32
    monkeypatch.setattr(tiny, "config", lambda kind: config)
    (block,) = (b for b in mixtures.structure("nemotron_h").blocks if b.experts is not None)
    behind = {name for name, reason in block.left.items() if reason.kind is Kind.BEHIND}
    assert behind == {f"{block.name}.mixer.fc2_latent_proj.weight"}
    assert "mixer.fc1_latent_proj.weight" in {w.view.parameter for w in block.weights}


def test_few_outputs_are_no_reason_in_a_dense_model(tmp_path: Path) -> None:
    """Keys and values of 8 outputs: servers join them with the queries, and want one scheme."""
    LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=1,
        head_dim=8, vocab_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    (block,) = find(build(tmp_path, torch.float32)).blocks
    assert not block.left and {w.rows for w in block.weights} == {8, 64}


@pytest.mark.parametrize(
    ("run", "want"),
    [
        (lambda m, x: m.a(x), {"a"}),
        (lambda m, x: m.b(m.a(x) + 1), {"a", "b"}),
        (lambda m, x: m.a(torch.ones(5, 8).add_(x)), {"a"}),
        (lambda m, x: m.a(_written(torch.zeros(5, 8), x)), {"a"}),
        (lambda m, x: (x + 1, m.a(torch.ones(5, 8))), set()),
    ],
)
def test_what_a_tensor_feeds(run: Any, want: set[str]) -> None:
    module, x = Parts(), torch.randn(5, 8)
    with torch.no_grad(), follow_products(module) as following:
        following.mark(x)
        run(module, x)
    assert following.behind == {f"{name}.weight" for name in want}


def _written(into: Tensor, x: Tensor) -> Tensor:
    into[:] = x
    return into


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(8))


@pytest.mark.parametrize(
    ("choose", "want"),
    [
        (lambda m, x: m.a(x).topk(2).indices, {"a"}),
        (lambda m, x: torch.topk(m.a(x).softmax(-1), 2)[1], {"a"}),
        (lambda m, x: (m.a(x).sigmoid() + m.bias).sort(descending=True)[1][:, :2], {"a"}),
        (lambda m, x: m.a(x).argmax(-1, keepdim=True), {"a"}),
        (lambda m, x: m.a(x).max(-1, keepdim=True).indices, {"a"}),
        (lambda m, x: m.b(m.a(x).relu()).topk(2)[1], {"b"}),
        (lambda m, x: (m.a(x) + m.b(x)).topk(2)[1], {"a", "b"}),
        (lambda m, x: m.a(x).masked_fill_(m.b(x) > 0, 0.0).topk(2)[1], {"a", "b"}),
        (lambda m, x: (x @ m.c.weight.t()).float().topk(2)[1].to(torch.int32), {"c"}),
        (lambda m, x: x.topk(2)[1], set()),
        (lambda m, x: torch.zeros(len(x), 2, dtype=torch.long), set()),
        (lambda m, x: nn.functional.linear(m.a(x), torch.randn(8, 8)).topk(2)[1], set()),
    ],
)
def test_what_lies_behind_a_choice(choose: Any, want: set[str]) -> None:
    module, x = Parts(), torch.randn(5, 8)
    with torch.no_grad(), follow_products(module) as following:
        unused = module.c(x).topk(2)[1]
        choices: Tensor = choose(module, x)
        assert following.before(choices) == {f"{name}.weight" for name in want}
        assert following.before(unused) == {"c.weight"} and not following.behind
        assert following.before(x) == following.before(module.a.weight) == frozenset()
