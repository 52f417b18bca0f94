"""Plan, GPTQ, stock loading, logits: on types chosen for variety. scripts/sweep_architectures.py does it for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checks
import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq import job
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning.weights import matches
from llmq.recipe.recipe import Recipe

TYPES = [
    "bart",  # weights of an attention that never runs stay as they are
    "bloom",
    "cohere2",  # masks per layer, attention and MLP in parallel, a tied head
    "falcon_h1",  # a state-space model and attention side by side
    "gemma3n_text",  # four hidden streams; keys and values of other layers
    "gpt_bigcode",  # some weights that stock transformers cannot load packed
    "mamba",  # weights used without calling their module
    "phi3",  # query, key and value in one weight
    "qwen3_5_text",  # linear and full attention in turn
    "xlnet",  # two streams, weights as bare 3-D parameters
    "zamba2",  # low-rank adapters, blocks of two kinds
]


MIXTURES = [
    "deepseek_v3",  # latent attention, dense blocks first, groups of experts, a shared expert
    "deepseek_v4",  # routes by token id at first; attention over compressed tokens
    "flex_olmo",
    "glm_moe_dsa",  # the tokens that attention chose go from block to block
    "hunyuan_v1_moe",  # a router that is a linear module
    "longcat_flash",  # experts that cannot be run one at a time, and some that return their input
    "jamba",  # state-space models and attention in turn; experts in every other block
    "minimax",  # linear attention
    "mixtral",  # experts under other names than in memory
    "nemotron_h",  # experts without a gate, in one of four kinds of block
    "qwen3_moe",
    "qwen3_next",  # a shared expert with a gate of one output
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_is_quantized_and_loaded_by_stock_transformers(name: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source")
    assert checks.is_mixture(checks.stock(source))
    done = checks.quantized(source, tmp_path / "out", tiny.tokens(4, 32, seed=2), tiny.tokens())
    assert done.error <= 1e-5
    assert 1e-3 < done.moved < 1
    assert "it decides which experts a token goes to" in done.left
    stacked = {n for n, p in checks.stock(source).named_parameters() if p.dim() == 3 and "expert" in n}
    experts = [item for item in done.plan.weights if item.expert is not None]
    assert stacked and {item.scheme for item in experts} == {llmq.Scheme(4, 32)}
    assert not [item for item in done.plan.weights if item.scheme is None and item.module in stacked]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MIXTURES, "hy_v4", "zaya"])
def test_mixtures_replayed_block_by_block_are_what_an_ordinary_forward_pass_computes(name: str, tmp_path: Path) -> None:
    structure, faults = checks.faults(tiny.make(name, tmp_path), tiny.tokens())
    assert not faults
    assert any(block.mixture for block in structure.blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen3_moe", "awq+gptq"),
        ("nemotron_h", "awq+rtn"),
        ("mixtral", "hqq"),
        ("deepseek_v3", "rtn"),
        ("qwen3_moe", "signround"),
        # longcat_flash, by awq+gptq and signround: tests/llmq/streaming/test_mixture_parts.py
    ],
)
def test_experts_by_other_methods(name: str, method: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source")
    # Enough steps that the rest of a block and its experts both learn.
    options = {"iterations": 12} if method == "signround" else {}
    done = checks.quantized(source, tmp_path / "out", tiny.tokens(4, 32, seed=2), tiny.tokens(), method, **options)
    assert done.error <= 1e-5
    assert 1e-3 < done.moved < 1


STACKED = [
    "aria_text",  # matrices stored as [in, out]
    "gpt_oss",  # the same, square ones too; gate and up in turn; biases
    "granitemoehybrid",
    "hy_v4",  # the tokens that attention chose go from block to block
    "inkling2_text",  # rows of gate and up in turn on disk
    "minimax_m3_vl_text",
    "inkling_text",  # shared experts in one tensor, too
    "llama4_text",  # one product for all experts, which transformers would make linear layers of
    "jetmoe",  # experts in its attention
    "dbrx",  # experts below each other in one matrix
    "zaya",  # states of routers, which have four layers, go from block to block
]


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKED)
def test_experts_stored_in_one_tensor_are_loaded_by_llmq_and_refused_by_stock(name: str, tmp_path: Path) -> None:
    # All that feeds anything in jetmoe is experts: no scale can move. What gptq does is the same for all of them.
    method = {"jetmoe": "gptq", "gpt_oss": "awq+gptq", "dbrx": "awq+gptq"}.get(name, "awq+rtn")
    source = tiny.make(name, tmp_path / "source")
    with pytest.raises(LlmqError, match="--loader llmq"):
        job.plan(str(source), llmq.Recipe(methods=("rtn",), scheme=llmq.Scheme(4, 32)))
    done = checks.quantized(source, tmp_path / "out", tiny.tokens(4, 32, seed=2), tiny.tokens(), method, "llmq")
    assert done.error <= 1e-5
    assert 1e-3 < done.moved < 1
    experts = [item for item in done.plan.weights if item.expert is not None]
    assert experts and {item.scheme for item in experts} == {llmq.Scheme(4, 32)}


def conditional(folder: Path) -> Any:
    """A mixture that reads images: config.json names a class whose text half the causal class is."""
    from transformers import Qwen3_5MoeForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen3_5MoeForConditionalGeneration(tiny.config("qwen3_5_moe"))
    tiny.shake(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")  # without it, the plan warns that images need one
    return Qwen3_5MoeForConditionalGeneration


def named_class(tmp_path: Path, **recipe: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], llmq.Report]:
    """The parameters of a mixture and of what is quantized of it, as the class that config.json names loads both."""
    kind = conditional(tmp_path / "source")
    wanted = llmq.Recipe(methods=("rtn",), scheme=llmq.Scheme(4, 32), **recipe)
    report = job.quantize(str(tmp_path / "source"), tmp_path / "out", wanted, ids=tiny.tokens(4, 32, seed=2))
    model, told = kind.from_pretrained(tmp_path / "out", dtype="float32", output_loading_info=True)
    assert not any(told.values())
    assert all(warning.startswith("only ") for warning in report.warnings)  # of what --keep leaves
    before = kind.from_pretrained(tmp_path / "source", dtype="float32")
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", output_loading_info=True)
    assert not any(told.values())
    values = ({n: p.detach() for n, p in loaded.named_parameters()} for loaded in (before, model))
    return next(values), next(values), report


@pytest.mark.slow
def test_a_mixture_within_a_larger_class_is_loaded_through_that_class(tmp_path: Path) -> None:
    before, after, report = named_class(tmp_path)
    names = {row.name for row in report.quantized}
    stacks = {name for name in before if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    for name, value in before.items():
        if name in stacks:
            assert 1e-3 < checks.apart(after[name], value) < 0.3
        elif name.removesuffix(".weight") not in names:
            assert after[name].equal(value), name
    assert len(stacks) == 8 and sum(".experts." in name for name in names) == 4 * 4 * 3
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(routers) == 4 and not {name.removesuffix(".weight") for name in routers} & names


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["experts", "re:layers\\.[02]\\..*\\.experts\\."])
def test_experts_that_are_kept_are_the_sources_through_that_class(pattern: str, tmp_path: Path) -> None:
    before, after, report = named_class(tmp_path, keep=(pattern,))
    kept = {name for name in before if ".experts." in name and matches(pattern, name)}
    assert len(kept) == (8 if pattern == "experts" else 4)
    assert all(after[name].equal(before[name]) for name in kept)
    assert sum(".experts." in row.name for row in report.quantized) == (0 if pattern == "experts" else 2 * 4 * 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_stock_transformers_gives_the_logits_of_the_weights_in_memory(name: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source")
    done = checks.quantized(source, tmp_path / "out", tiny.tokens(4, 32, seed=2), tiny.tokens())
    assert done.error <= 1e-3
    assert 1e-3 < done.moved < 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "nothing to quantize: it is not the weight of a Linear module"),
        ("falcon", "nothing to quantize: stock transformers cannot load it packed"),
    ],
)
def test_refused_before_any_work(name: str, words: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source")
    with pytest.raises(LlmqError, match=words):
        job.plan(str(source), out=tmp_path / "out", ids=tiny.tokens(4, 32))
    assert not (tmp_path / "out").exists()


def test_joined_tensors_that_only_stock_transformers_will_find_are_warned_of(tmp_path: Path) -> None:
    def told(kind: str, *keep: str) -> list[str]:
        recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 32), keep=keep)
        plan = job.plan(str(tiny.make(kind, tmp_path / kind)), recipe, ids=tiny.tokens(2, 16))
        return [words for words in plan.warnings if "written as one tensor" in words]

    (warning,) = told("olmo_hybrid")
    assert "0.linear_attn.q_conv1d.weight" in warning and "0.linear_attn.conv1d.weight" in warning
    assert not told("qwen3_moe", "experts")
    # vLLM's Mixtral has experts by the checkpoint's names, and refused a folder with transformers' name for a stack.
    (warning,) = told("mixtral", "experts")
    assert "block_sparse_moe.experts.0.w2.weight" in warning and "layers.0.mlp.experts.down_proj, and" in warning
