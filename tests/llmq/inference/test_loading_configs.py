"""What config.json says against what the files have: activation order, zero points, values of the wrong kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import llmq
from llmq.inference.transformers_hook import KernelQuantizer, use_kernels
from tests.llmq.inference.test_transformers_hook import apart, layers, logits
from tests.llmq.written import Case, Tensors, compressed, edit, save, stream, write
from tests.llmq.written import config as written_config


def change(folder: Path, edited: Callable[[Any], Any]) -> None:
    """Changes the quantization_config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    edited(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(config: Any) -> Any:
    """The weights' part of the only config group."""
    return config["config_groups"]["group_0"]["weights"]


def drop_order(state: Tensors) -> None:
    for name in [n for n in state if n.endswith("g_idx")]:
        del state[name]


@pytest.mark.parametrize(
    "case, key, value, stored",
    [
        (Case("gptq"), "desc_act", True, True),
        (Case("gptq"), "desc_act", False, False),
        (Case("ct"), "actorder", "static", False),
        (Case("ct"), "actorder", "weight", False),
        (Case("ct"), "actorder", False, False),
    ],
)
def test_no_order(case: Case, key: str, value: Any, stored: bool, tmp_path: Path) -> None:
    """A g_idx in the natural order, and none where the configuration needs none, load."""
    dense = write(tmp_path / "m", case)
    if not stored:
        edit(tmp_path / "m", drop_order)
    change(tmp_path / "m", lambda own: (own if case.kind == "gptq" else weights_of(own)).update({key: value}))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert layers(model)
    assert apart(logits(model), logits(dense)) < 1e-4


@pytest.mark.parametrize("value", ["group", "Group", "dynamic", True])
def test_order_by_every_name_of_it(value: Any, tmp_path: Path) -> None:
    """compressed-tensors has called it by several names; each needs the g_idx."""
    dense = write(tmp_path / "m", Case("ct", order=True))
    change(tmp_path / "m", lambda own: weights_of(own).update(actorder=value))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert apart(logits(model), logits(dense)) < 1e-4
    edit(tmp_path / "m", drop_order)
    with pytest.raises(llmq.LlmqError, match="weight_g_idx is missing"):
        llmq.load(tmp_path / "m", device_map="cpu")


def llama4(folder: Path) -> Any:
    """A folder of compressed-tensors with an expert each a module, and the dense model."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig
    from transformers.quantizers.base import SequentialLlama4TextExperts

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    config = Llama4TextConfig(vocab_size=256, initializer_range=0.2, **sizes, **heads, **experts)
    model = Llama4ForCausalLM(config).eval()
    model.model.layers[0].feed_forward.experts = SequentialLlama4TextExperts(config)
    case, state, rng = Case("ct"), dict(model.state_dict()), np.random.default_rng(0)
    ignored = [name for name, _ in model.named_modules() if "router" in name or name == "lm_head"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in ignored:
            made, weight = compressed(rng, module.out_features, module.in_features, case)
            del state[f"{name}.weight"]
            state |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
            module.weight.data = torch.from_numpy(weight.astype(np.float32))
    model.config.quantization_config = written_config(case) | {"ignore": ignored}
    model.config.to_json_file(folder / "config.json")
    save(folder, state)
    return model


def test_experts_that_transformers_takes_apart(tmp_path: Path) -> None:
    dense = llama4(tmp_path)
    model = llmq.load(tmp_path, device_map="cpu", dtype="float32")
    assert len(layers(model)) == 4 + 3 + 2 * 3
    assert apart(logits(model), logits(dense)) < 1e-4


def test_experts_that_nobody_takes_apart_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that does not know how to take them apart would leave them random."""
    from transformers.quantizers import base

    llama4(tmp_path)
    monkeypatch.setattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    with pytest.raises(llmq.LlmqError, match="transformers has no rule for llama4"):
        llmq.load(tmp_path, device_map="cpu", dtype="float32")


def add_zeros(case: Case, packed: bool, value: int) -> Callable[[Tensors], None]:
    """Zero points for symmetric weights: 0, or another value in the first place."""

    def add(state: Tensors) -> None:
        for name in [n for n in state if n.endswith(".weight_scale")]:
            zeros = np.zeros(tuple(state[name].shape), dtype=np.int8)
            zeros.flat[0] = value
            made = torch.from_numpy(zeros)
            if packed:
                made = torch.from_numpy(stream(zeros.T + (1 << case.bits - 1), case.bits).T.copy())
            state[name.replace("_scale", "_zero_point")] = made

    return add


@pytest.mark.parametrize(
    "case, packed", [(Case("ct"), True), (Case("ct"), False), (Case("ct", 3), True), (Case("ct-int8", 8), False)]
)
def test_zero_points_of_symmetric_weights(case: Case, packed: bool, tmp_path: Path) -> None:
    """Stored although they are none, packed or as they are: 0 is what they may be."""
    dense = write(tmp_path / "m", case)
    edit(tmp_path / "m", add_zeros(case, packed, 0))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert apart(logits(model), logits(dense)) < 1e-4
    edit(tmp_path / "m", add_zeros(case, packed, 1))
    with pytest.raises(llmq.LlmqError, match="model.layers.0.*symmetric, but weight_zero_point has other values"):
        llmq.load(tmp_path / "m", device_map="cpu")


def test_zero_points_of_weights_that_meet_int8(tmp_path: Path) -> None:
    case = Case("ct-int8", 8, -1)
    write(tmp_path / "m", case)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    change(tmp_path / "m", lambda own: own["config_groups"]["group_0"].update(input_activations=inputs))
    edit(tmp_path / "m", add_zeros(case, False, 0))
    assert "rows" in {layer.layout for layer in layers(llmq.load(tmp_path / "m", device_map="cpu"))}
    edit(tmp_path / "m", add_zeros(case, False, -3))
    with pytest.raises(llmq.LlmqError, match="symmetric, but weight_zero_point has other values"):
        llmq.load(tmp_path / "m", device_map="cpu")


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("ct", {"config_groups": [{"targets": ["Linear"]}]}, r"config_groups must be an object, not \[\{'targets'"),
        ("ct", {"config_groups": {"group_0": 3}}, "config_groups.group_0 must be an object, not 3"),
        ("ct", {"config_groups": {"group_0": {"weights": []}}}, r"config_groups.group_0.weights must be .*not \[\]"),
        ("ct", {"transform_config": [1]}, r"transform_config must be an object, not \[1\]"),
        ("gptq", {"dynamic": ["x"]}, r"dynamic must be an object, not \['x'\]"),
        ("gptq", {"dynamic": {r"+:.*q_proj": 8}}, r"dynamic '\+:\.\*q_proj' must be an object, not 8"),
        ("gptq", {"dynamic": {"+:*.bad(": {"bits": 4}}}, r"dynamic has '\*\.bad\(', no regular expression: nothing"),
        ("auto-round", {"extra_config": {"*.bad(": {"bits": 4}}}, r"extra_config has '\*\.bad\(', no regular"),
        ("auto-round", {"extra_config": ["x"]}, r"extra_config must be an object, not \['x'\]"),
    ],
)
def test_values_of_the_wrong_kind(kind: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m", Case("ct" if kind == "ct" else "gptq"))
    if kind == "auto-round":
        change(tmp_path / "m", lambda own: own.update(quant_method=kind, packing_format="auto_round:auto_gptq"))
    change(tmp_path / "m", lambda own: own.update(values))
    use_kernels()
    try:
        with pytest.raises(llmq.LlmqError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    finally:
        use_kernels(False)


def test_presets_of_compressed_tensors(tmp_path: Path) -> None:
    """The name of a preset, and its targets."""
    dense = write(tmp_path / "m", Case("ct", 4, 128), hidden_size=128)
    change(tmp_path / "m", lambda own: own.update(config_groups={"W4A16": ["Linear"]}))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert apart(logits(model), logits(dense)) < 1e-4


def test_as_older_transformers_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.21 there is no model in a call, and no `dequantize` in a configuration."""
    dense = write(tmp_path / "m", Case("ct-int8", 8, -1))
    newer, made = KernelQuantizer.update_weight_conversions, CompressedTensorsConfig.__init__

    def older(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        del self.dequantize

    monkeypatch.setattr(KernelQuantizer, "update_weight_conversions", lambda self, found, _: newer(self, found))
    monkeypatch.setattr(CompressedTensorsConfig, "__init__", older)
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert layers(model)
    assert apart(logits(model), logits(dense)) < 1e-4
