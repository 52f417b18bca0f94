"""Experts that are packed one by one: found by transformers' rules, loaded packed, or refused; never random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.discovery import blocks as discover
from llmq.formats.gptq import GPTQReader
from llmq.inference.placeholders import refuse_random
from llmq.inference.stack import PackedStack
from llmq.inference.transformers_hook import reading, use_kernels
from tests.architectures import tiny
from tests.llmq.packed_mixtures import mixture, standard
from tests.llmq.refusal import refused
from tests.llmq.written import Case, Tensors, compressed, config, save

CASES = [
    Case("ct", 2),
    Case("ct", 3, 32, True),
    Case("ct"),
    Case("ct", 6),
    Case("ct", 8, -1),
    Case("ct-int8", 8, -1),
    Case("gptq", 4, 32, True),
    Case("gptq", 3, 32, True, order=True),
    Case("awq", 4, 32, True),
]
#: Names like those of the usual checkpoints, and others: with a shared expert, a renamed module, w1/w2/w3, no gate.
TYPES = [
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "minimax",
    "qwen3_next",
    "flex_olmo",
    "lfm2_moe",
    "nemotron_h",
]


def stacks(model: Any) -> list[PackedStack]:
    return [module for module in model.modules() if isinstance(module, PackedStack)]


def apart(model: Any, dense: Any) -> float:
    x = tiny.tokens()
    with torch.inference_mode():
        found, wanted = model(x).logits.float(), dense(x).logits.float()
    return float((found - wanted).norm() / wanted.norm())


def load(folder: Path, **options: Any) -> Any:
    return llmq.load(folder / "packed", device_map="cpu", **({"dtype": "float32"} | options))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_of_dense_experts(case: Case, tmp_path: Path) -> None:
    dense = mixture(tmp_path, "mixtral", case)
    model = load(tmp_path)
    assert len(stacks(model)) == 8
    assert not [n for n, p in model.named_parameters() if p.dim() == 3]
    assert apart(model, dense) < 1e-5
    model.set_experts_implementation("eager")
    assert apart(model, dense) < 1e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_types(model_type: str, tmp_path: Path) -> None:
    dense = mixture(tmp_path, model_type, Case("ct"))
    model = load(tmp_path)
    assert stacks(model)
    assert apart(model, dense) < 1e-5
    change(tmp_path, halved)
    half, rounded = load(tmp_path, dtype="bfloat16"), dense.to(torch.bfloat16)
    assert apart(half, rounded) < 0.1, "bfloat16 may choose other experts, no more"
    held = sum(b.numel() * b.element_size() for s in stacks(half) for b in s.buffers())
    assert held < 0.5 * sum(s.shape.numel() for s in stacks(half)) * 2


@pytest.mark.parametrize("case", [Case("ct"), Case("gptq", 4, 32, True)], ids=str)
def test_names_of_other_writers(case: Case, tmp_path: Path) -> None:
    dense = mixture(tmp_path, "mixtral", case, standard)
    model = load(tmp_path)
    assert len(stacks(model)) == 8
    assert apart(model, dense) < 1e-5


def test_the_base_model_and_use_kernels(tmp_path: Path) -> None:
    from transformers import AutoModel

    dense = mixture(tmp_path, "qwen3_moe", Case("ct-int8", 8, 32))
    use_kernels()
    try:
        model = AutoModel.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    finally:
        use_kernels(False)
    assert len(stacks(model)) == 8
    x = tiny.tokens()
    with torch.inference_mode():
        torch.testing.assert_close(model(x).last_hidden_state, dense.model(x).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_some_layers_dense(tmp_path: Path) -> None:
    dense = mixture(tmp_path, "qwen3_moe", Case("gptq", 4, 32, True), only="layers.1.")
    values = (tmp_path / "packed" / "config.json").read_text()
    rest = '"dynamic": {"-:.*layers\\\\.[023]\\\\..*": {}}, "bits": 4'
    (tmp_path / "packed" / "config.json").write_text(values.replace('"bits": 4', rest))
    model = load(tmp_path)
    assert [s.name.split(".")[2] for s in stacks(model)] == ["1", "1"]
    assert apart(model, dense) < 1e-5


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    for file in (folder / "packed").glob("*.safetensors"):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})


def halved(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith("scale"):
            tensors[name] = tensor.bfloat16()


def without(part: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return edit


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


WRONG = {
    "an expert": (without("1.mlp.experts.2.gate_proj"), "no tensor of model.layers.1.mlp.experts.2.gate_proj"),
    "the last": (without("1.mlp.experts.3.down_proj"), "no tensor of model.layers.1.mlp.experts.3.down_proj"),
    "one kind": (without("1.mlp.experts.0.up_proj"), "no tensor of model.layers.1.mlp.experts.0.up_proj"),
    "all of a kind": (without("up_proj"), "no tensor like"),
    "one tensor": (without("1.mlp.experts.2.gate_proj.weight_scale"), "2.gate_proj.weight_scale is missing"),
    "too many": (renamed("1.mlp.experts.2.", "1.mlp.experts.7."), "no tensor of model.layers.1.mlp.experts.2."),
    "other names": (renamed("up_proj", "side_proj"), "transformers has no rule for qwen3_moe"),
    "two kinds of names": (renamed("experts.2.gate_proj", "experts.2.w1"), "names of two kinds"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_experts_are_refused(wrong: str, tmp_path: Path) -> None:
    edit, told = WRONG[wrong]
    mixture(tmp_path, "qwen3_moe", Case("ct"))
    change(tmp_path, edit)
    refused(lambda: load(tmp_path), told)


@pytest.mark.parametrize(
    ("part", "needed"),
    [
        ("layers.1.mlp.experts.", "model.layers.1.mlp.experts."),
        ("down_proj", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_a_stack_without_any_tensor_is_refused_where_only_from_pretrained_is_called(
    part: str, needed: str, tmp_path: Path
) -> None:
    """transformers fills it with random numbers, and only logs it."""
    mixture(tmp_path, "qwen3_moe", Case("ct"))
    change(tmp_path, without(part))
    use_kernels()
    try:
        refused(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), f"no tensor of {needed}")
    finally:
        use_kernels(False)


def test_experts_of_a_layer_may_be_one_dense_tensor(tmp_path: Path) -> None:
    """As llmq writes those that are kept: under the parameter's own name."""
    dense = mixture(tmp_path, "qwen3_moe", Case("gptq", 4, 32, True), only="layers.1.")
    values = (tmp_path / "packed" / "config.json").read_text()
    rest = '"dynamic": {"-:.*layers\\\\.[023]\\\\..*": {}}, "bits": 4'
    (tmp_path / "packed" / "config.json").write_text(values.replace('"bits": 4', rest))
    fused = {f"{n}.mlp.experts": m.mlp.experts for n, m in dense.named_modules() if n == "model.layers.2"}

    def edit(tensors: Tensors) -> None:
        had = [name for name in tensors if "layers.2.mlp.experts." in name]
        without("layers.2.mlp.experts.")(tensors)
        if had and fused:
            name, module = fused.popitem()
            tensors |= {f"{name}.{n}": p.detach().clone() for n, p in module.named_parameters()}

    change(tmp_path, edit)
    assert not fused
    model = load(tmp_path)
    assert [s.name.split(".")[2] for s in stacks(model)] == ["1", "1"]
    assert apart(model, dense) < 1e-5


def test_one_expert_more_than_the_model_has(tmp_path: Path) -> None:
    mixture(tmp_path, "qwen3_moe", Case("ct"))

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "2.mlp.experts.3." in name]:
            tensors[name.replace("experts.3.", "experts.4.")] = tensors[name].clone()

    change(tmp_path, edit)
    refused(lambda: load(tmp_path), "2.mlp.experts.4.", "is stored, but config.json says that there are 4 experts")


def test_an_expert_stored_otherwise_is_refused(tmp_path: Path) -> None:
    mixture(tmp_path, "qwen3_moe", Case("gptq", 4, 32, True))
    place = "layers.0.mlp.experts.1.down_proj"

    def edit(tensors: Tensors) -> None:
        if any(place in name for name in tensors):
            without(place)(tensors)
            tensors[f"model.{place}.weight"] = torch.ones(64, 32)

    change(tmp_path, edit)
    refused(lambda: load(tmp_path), f"model.{place}")


def test_experts_that_no_rule_places_are_refused_where_stock_would_fill_them_with_noise(tmp_path: Path) -> None:
    """gpt_oss: stored by others one by one, in a model whose stacks are transposed, interleaved and biased."""
    folder = tiny.make("gpt_oss", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {n: t for n, t in model.state_dict().items() if ".experts." not in n}
    width, inner = model.config.hidden_size, model.config.intermediate_size
    for layer in range(model.config.num_hidden_layers):
        for expert in range(model.config.num_local_experts):
            for name, shape in (
                ("gate_proj", (inner, width)),
                ("up_proj", (inner, width)),
                ("down_proj", (width, inner)),
            ):
                made, _ = compressed(np.random.default_rng(0), *shape, Case("ct"))
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                state |= {f"{stem}.{suffix}": value for suffix, value in made.items()}
    (tmp_path / "packed").mkdir()
    save(tmp_path / "packed", state)
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": config(Case("ct"))}
    values["quantization_config"]["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*router.*"]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(values))
    refused(lambda: load(tmp_path), "transformers has no rule for gpt_oss", "with the tool that wrote it")


@pytest.mark.slow
def test_linear_modules_that_need_their_values_are_made_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """deepseek_v4's grouped output projection is a Linear by class, but multiplies its rows group by group."""
    from llmq import job
    from llmq.grids.scheme import Scheme
    from llmq.recipe.recipe import Recipe

    tiny.make("deepseek_v4", tmp_path / "m")
    job.quantize(
        str(tmp_path / "m"), tmp_path / "packed", Recipe(methods=("rtn",), scheme=Scheme(bits=4, group_size=32))
    )
    model = load(tmp_path)
    assert stacks(model) and "is no plain linear layer" in caplog.text
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert apart(model, stock) < 1e-5


def test_foreign_names_are_refused_where_stock_would_have_to_load_them(tmp_path: Path) -> None:
    mixture(tmp_path, "mixtral", Case("ct"), standard)

    def edit(tensors: Tensors) -> None:
        if any("layers.0.self_attn.q_proj" in name for name in tensors):
            tensors["model.norm.weight_packed"] = torch.zeros(64, 8, dtype=torch.int32)

    change(tmp_path, edit)
    refused(lambda: load(tmp_path), "transformers has no rule for mixtral", "quantize the model with llmq")


OUTPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize("foreign", [True, False], ids=["foreign names", "own names"])
def test_what_the_configuration_sends_to_stock_is_never_random(foreign: bool, tmp_path: Path) -> None:
    """`use_kernels` and plain from_pretrained: the reader refuses the configuration before it sees any file."""
    dense = mixture(tmp_path, "mixtral", Case("ct"), standard if foreign else str)
    path = tmp_path / "packed" / "config.json"
    values = json.loads(path.read_text())
    for group in values["quantization_config"]["config_groups"].values():
        group["output_activations"] = OUTPUTS
    path.write_text(json.dumps(values))
    with reading():
        if foreign:
            told = "transformers has no rule for mixtral"
            refused(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), told, ".experts.0.")
            return
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    experts = {name: value for name, value in dense.state_dict().items() if "experts" in name}
    assert len(experts) == 2 * tiny.LAYERS
    for name, value in experts.items():
        assert float((model.get_parameter(name) - value).norm() / value.norm()) < 1e-3, name


def test_packed_experts_that_no_quantizer_joins_are_refused(tmp_path: Path) -> None:
    """As those of GPTQ, whose quantizer in transformers has no rules."""
    mixture(tmp_path, "qwen3_moe", Case("gptq"))
    model = discover.build(tmp_path / "dense", torch.float32)
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    told = "or none for packed weights: it would fill that with random numbers", "model.layers.0.mlp.experts"
    refused(lambda: refuse_random(model, None, GPTQReader.suffixes, files), *told)


def test_what_is_left_alone_is_found_by_the_name_that_it_is_stored_under(tmp_path: Path) -> None:
    """phimoe's router, a Linear: `ignore` has the checkpoint's name, which transformers changes."""
    dense = mixture(tmp_path, "phimoe", Case("ct"))
    ignored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.gate" in ignored and "model.layers.0.mlp.router" not in ignored
    model = load(tmp_path)
    assert len(stacks(model)) == 8 and apart(model, dense) < 1e-5
