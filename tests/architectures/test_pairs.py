"""Pairs by what they connect, held against the code of the models; scripts/sweep_pairs.py applies those of all types.

An arrow's left side may name some rows only: `v_rows`, `up_rows` are checked entry by entry below.
"""

from __future__ import annotations

from pathlib import Path

import checks
import pytest
import tiny
import torch
from torch import Tensor

from llmq.discovery import blocks as discover
from llmq.discovery import find_pairs as pairs
from llmq.discovery.pairs import Found, Pair

V_O, UP_DOWN = "self_attn.v_proj -> self_attn.o_proj", "mlp.up_proj -> mlp.down_proj"
IN_QKV = "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
GATED = "mlp.gate_proj, mlp.up_proj"
USUAL = {IN_QKV, f"post_attention_layernorm -> {GATED}", V_O, UP_DOWN}

EXPECTED: dict[str, set[str]] = {
    "llama": USUAL,
    "mistral": USUAL,
    "qwen3": USUAL,  # norms of queries and keys give nothing
    # Norms on both sides: those behind attention and MLP feed the residual stream.
    "gemma2": {IN_QKV, f"pre_feedforward_layernorm -> {GATED}", V_O, UP_DOWN},
    "gemma3_text": {IN_QKV, f"pre_feedforward_layernorm -> {GATED}", V_O, UP_DOWN},
    "olmo2": {V_O, UP_DOWN},  # norms behind attention and MLP only
    "cohere2": {f"{IN_QKV}, {GATED}", V_O, UP_DOWN},  # attention and MLP in parallel behind one norm
    "phi3": {
        "input_layernorm -> self_attn.qkv_proj",
        "post_attention_layernorm -> mlp.gate_up_proj",
        "self_attn.qkv_proj[v_rows] -> self_attn.o_proj",
        "mlp.gate_up_proj[up_rows] -> mlp.down_proj",
    },
    "gpt_neox": {  # GELU: nothing moves through it
        "input_layernorm -> attention.query_key_value",
        "post_attention_layernorm -> mlp.dense_h_to_4h",
        "attention.query_key_value[v_rows] -> attention.dense",
    },
    "gpt2": {"ln_1 -> attn.c_attn", "ln_2 -> mlp.c_fc", "attn.c_attn[v_rows] -> attn.c_proj"},
    "falcon": {  # one norm, attention and MLP in parallel, all heads share one head of keys and values
        "input_layernorm -> self_attention.query_key_value, mlp.dense_h_to_4h",
        "self_attention.query_key_value[v_rows] -> self_attention.dense",
    },
    "opt": {  # ReLU lets positive factors through
        "self_attn_layer_norm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
        "self_attn.v_proj -> self_attn.out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",
    },
}
SHIFTABLE = {"gpt_neox": 3, "gpt2": 3, "opt": 3}  # per block: biases on both sides; nothing shifts through a ReLU

OTHERS = [
    "bamba",  # state space layers
    "bart",  # attention to an encoder that is not there, norms behind
    "bloom",  # arguments made for one batch size
    "deepseek_v3",  # keys and values from one low-rank matrix; experts in later blocks
    "gemma3n_text",  # layers that reuse the values of others, four hidden streams
    "gpt_oss",  # experts
    "nemotron",  # 1 + w in a LayerNorm with bias, squared ReLU
    "xlnet",  # weights as bare 3-D parameters
    "zamba2",  # blocks that share a transformer layer
]


def found_in(folder: Path) -> dict[str, Found]:
    model = discover.build(folder, torch.float32)
    found = pairs.find_in(model, discover.find(model))
    assert all(p.device.type == "meta" for p in model.parameters())
    return found


def described(pair: Pair) -> str:
    rows = "" if pair.rows is None else "[v_rows]" if pair.channels <= pair.entries // 3 else "[up_rows]"
    consumers = ", ".join(s.parameter.removesuffix(".weight") for s in pair.consumers)
    return f"{pair.source.removesuffix('.weight')}{rows} -> {consumers}"


@pytest.mark.parametrize("name", EXPECTED)
def test_finds_what_the_code_connects(name: str, tmp_path: Path) -> None:
    found = found_in(tiny.make(name, tmp_path))
    assert len(found) == tiny.LAYERS
    for own in found.values():
        assert {described(pair) for pair in own.pairs} == EXPECTED[name]
        assert sum(pair.shiftable for pair in own.pairs) == SHIFTABLE.get(name, 0)
        offset = float(name in ("gemma2", "gemma3_text"))
        assert {pair.offset for pair in own.pairs if pair.kind == "norm"} <= {offset}
        assert {consumer.axis for pair in own.pairs for consumer in pair.consumers} == {0 if name == "gpt2" else 1}
    real = checks.stock(tmp_path)
    before = checks.logits(real, tiny.tokens())
    applied = checks.pairs_applied(real, found, before, tiny.tokens())
    assert applied["error"] <= 1e-4
    assert applied["without"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_leaves_the_logits_as_they_were(name: str, tmp_path: Path) -> None:
    found = found_in(tiny.make(name, tmp_path))
    real = checks.stock(tmp_path)
    applied = checks.pairs_applied(real, found, checks.logits(real, tiny.tokens()), tiny.tokens())
    assert applied["error"] <= 1e-4
    if name != "xlnet":
        assert applied["pairs"] and applied["without"] > 1e-3


def heads(heads: int, kv_heads: int, size: int) -> Tensor:
    """For each column of the output projection, its channel among those of the value heads."""
    return torch.arange(kv_heads * size).reshape(kv_heads, 1, size).expand(-1, heads // kv_heads, -1).flatten()


def rows_and_columns(folder: Path, source: str) -> tuple[Tensor, Tensor]:
    own = next(iter(found_in(folder).values()))
    pair = next(pair for pair in own.pairs if pair.source == source)
    rows = torch.arange(pair.entries) if pair.rows is None else pair.rows
    return rows, pair.consumers[0].channel


def test_grouped_heads_share_channels(tmp_path: Path) -> None:
    rows, columns = rows_and_columns(tiny.make("llama", tmp_path), "self_attn.v_proj.weight")
    assert len(rows) == 32  # 2 of 4 heads of 16
    assert torch.equal(columns, heads(4, 2, 16))


def test_values_at_the_end_of_a_fused_weight(tmp_path: Path) -> None:
    rows, columns = rows_and_columns(tiny.make("phi3", tmp_path), "self_attn.qkv_proj.weight")
    assert torch.equal(rows, 64 + 32 + torch.arange(32))
    assert torch.equal(columns, heads(4, 2, 16))


def test_values_interleaved_by_head(tmp_path: Path) -> None:
    rows, columns = rows_and_columns(tiny.make("gpt_neox", tmp_path), "attention.query_key_value.weight")
    assert torch.equal(rows, torch.arange(192).reshape(4, 3, 16)[:, 2].flatten())
    assert torch.equal(columns, torch.arange(64))


def test_one_head_of_values_for_all(tmp_path: Path) -> None:
    rows, columns = rows_and_columns(tiny.make("falcon", tmp_path), "self_attention.query_key_value.weight")
    assert torch.equal(rows, 64 + 16 + torch.arange(16))
    assert torch.equal(columns, heads(4, 1, 16))


def test_the_ungated_half(tmp_path: Path) -> None:
    rows, columns = rows_and_columns(tiny.make("phi3", tmp_path), "mlp.gate_up_proj.weight")
    assert torch.equal(rows, 128 + torch.arange(128))
    assert torch.equal(columns, torch.arange(128))


def test_says_why_not(tmp_path: Path) -> None:
    own = next(iter(found_in(tiny.make("qwen3", tmp_path)).values()))
    reasons = {r.source.removesuffix(".weight"): r.reason for r in own.rejections}
    assert reasons["self_attn.q_proj"] == "its output is normalized: a common factor on it changes nothing"
    assert reasons["self_attn.k_norm"] == "no matrix product has an input that scales with it channel by channel"
    assert reasons["mlp.down_proj"] == "no matrix product of the block comes after it"
    assert reasons.keys() == {f"self_attn.{n}" for n in ("q_proj", "k_proj", "o_proj", "q_norm", "k_norm")} | {
        "mlp.gate_proj",
        "mlp.down_proj",
    }
    rows = pairs.explain(own.pairs, own.rejections)
    assert len(rows) == len(own.pairs) + len(own.rejections)
    assert ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "linear") in rows


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    model = discover.build(tiny.make("gemma3_text", tmp_path), torch.bfloat16)
    dtypes = {name: b.dtype for name, b in model.named_buffers()}
    found = pairs.find_in(model, discover.find(model))
    assert all({described(p) for p in own.pairs} == EXPECTED["gemma3_text"] for own in found.values())
    assert dtypes == {name: b.dtype for name, b in model.named_buffers()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen3_moe", {"gate_up_proj[up_rows] -> down_proj"}),
        ("mixtral", {"gate_up_proj[up_rows] -> down_proj"}),
        ("gpt_oss", set()),  # the up half is clamped, and 1 is added to it
    ],
)
def test_pairs_within_an_expert(kind: str, expected: set[str], tmp_path: Path) -> None:
    for own in found_in(tiny.make(kind, tmp_path)).values():
        inside, rejections = own.experts
        assert {described(pair) for pair in inside} == expected
        assert {r.source for r in rejections} == {"gate_up_proj", "down_proj"} - {pair.source for pair in inside}
        # The others are those of a block whose experts return their input.
        assert all("experts" not in name for pair in own.pairs for name in described(pair).split())
