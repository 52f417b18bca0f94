"""Discovery against an ordinary forward pass, on types chosen for variety; scripts/sweep_architectures.py has all."""

from __future__ import annotations

from pathlib import Path

import checks
import pytest
import tiny
import torch

from llmq.discovery import blocks as discover
from llmq.discovery.reasons import Kind
from llmq.errors import LlmqError

DENSE = [
    "bart",  # a decoder cut from an encoder-decoder; attention to an encoder that is not there
    "bloom",  # fused attention, alibi
    "camembert",  # a tied head with a tied bias
    "falcon",  # its own Linear class, attention and MLP in parallel
    "gemma3n_text",  # layers that reuse the keys of others, four hidden streams in one tensor
    "gpt2",  # no Linear at all in its blocks
    "llama",
    "mamba",  # weights used without calling their module
    "modernbert-decoder",  # masks and rotary tables per layer
    "qwen3_5_text",  # linear and full attention in turn
    "recurrent_gemma",  # recurrent blocks with 3-D gates, which are no experts
    "xlnet",  # two streams, weights as bare 3-D parameters
    "zamba2",  # blocks that share a transformer layer
]
MIXTURES = ["dbrx", "gpt_oss", "llama4_text", "mixtral"]


@pytest.mark.parametrize("name", DENSE)
def test_agrees_with_an_ordinary_forward_pass(name: str, tmp_path: Path) -> None:
    structure, faults = checks.faults(tiny.make(name, tmp_path), tiny.tokens())
    assert not faults
    assert len(structure.blocks) == tiny.LAYERS


@pytest.mark.parametrize("name", MIXTURES)
def test_refuses_experts(name: str, tmp_path: Path) -> None:
    model = discover.build(tiny.make(name, tmp_path), torch.float32)
    with pytest.raises(LlmqError, match="mixture-of-experts models are not supported yet"):
        discover.find(model)


def test_refuses_blocks_called_twice(tmp_path: Path) -> None:
    model = discover.build(tiny.make("hrm_text", tmp_path), torch.float32)
    with pytest.raises(LlmqError, match="called more than once per pass"):
        discover.find(model)


def test_names_what_it_leaves(tmp_path: Path) -> None:
    structure = discover.find(discover.build(tiny.make("zamba", tmp_path), torch.float32))
    reasons = {reason for block in structure.blocks for reason in block.left.values()}
    assert "it is shared with another block" in {str(reason) for reason in reasons}
    assert Kind.SHARED in {reason.kind for reason in reasons}


def test_weights_with_one_input_share_it(tmp_path: Path) -> None:
    structure = discover.find(discover.build(tiny.make("llama", tmp_path), torch.float32))
    by_leaf = {w.name.rpartition(".")[2]: w for w in structure.blocks[2].weights}
    input_id = {leaf: w.input_id for leaf, w in by_leaf.items()}
    assert input_id["q_proj"] == input_id["k_proj"] == input_id["v_proj"] != input_id["o_proj"]
    assert input_id["gate_proj"] == input_id["up_proj"] != input_id["down_proj"]
    assert {leaf for leaf, w in by_leaf.items() if w.row_parallel} == {"o_proj", "down_proj"}
