"""Folders on llmq's kernels: the logits of dense weights, in packed memory; compiled, trained on, undone, refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import llmq
from llmq import formats
from llmq.formats.gptq import GPTQReader
from llmq.inference.linear import IntLinear
from llmq.inference.pretrained import load_model
from llmq.inference.transformers_hook import use_kernels
from llmq_kernels.int_linear import layouts
from tests.llmq.written import Case, Tensors, edit, linears, save, tiny, write

CASES = [
    *(Case("ct", bits, 32, zeros) for bits in (2, 3, 4, 5, 6, 7, 8) for zeros in (False, True)),
    Case("ct", 4, -1),
    Case("ct-tensor", 4),
    Case("ct-int8", 8, 32, True),
    Case("ct-int8", 8, -1),
    *(Case("gptq", bits, 32, zeros) for bits in (2, 3, 4, 8) for zeros in (False, True)),
    *(Case("gptq", bits, 32, True, order=True) for bits in (2, 3, 4, 8)),
    *(Case("gptq_v2", bits, 16, True) for bits in (2, 3, 4, 8)),
    Case("gptq", 4, -1),
    Case("awq", 4, 32, True),
    Case("awq", 4, -1),
]
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def kernels() -> Any:
    """from_pretrained on kernels for one test."""
    use_kernels()
    yield
    use_kernels(False)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS).logits.float()
    return out


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def layers(model: Any) -> list[llmq.QuantLinear]:
    return [module for module in model.modules() if isinstance(module, llmq.QuantLinear)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_of_dense_weights(case: Case, tmp_path: Path, kernels: None) -> None:
    dense = write(tmp_path / "m", case, shards=1 if case.bits == 4 else 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert len(layers(model)) == len(list(linears(dense)))
    exact = logits(dense)
    assert apart(logits(model), exact) < 1e-4
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16
    rounded = logits(dense.to(torch.bfloat16))
    # What bfloat16 does to the dense model itself: sums in another order differ by as much.
    noise = apart(rounded, exact)
    assert apart(logits(half), rounded) < max(1e-2, 1.5 * noise)
    assert noise < 3e-2
    # Layouts for one processor may hold narrow codes in 4 bits, and fill up small weights; 5 to 7 bits run as 8.
    bits = 8 if case.bits > 4 else 4 if layers(model)[0].layout == "int4pack" else case.bits
    held = sum(b.numel() * b.element_size() for layer in layers(model) for b in layer.buffers())
    assert held <= sum(layer.in_features * layer.out_features for layer in layers(model)) * (bits + 4) / 8


def test_load(tmp_path: Path) -> None:
    dense = write(tmp_path / "m", Case("gptq", 4, 32, True, True))
    before = dict(AUTO_QUANTIZER_MAPPING)
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert before == AUTO_QUANTIZER_MAPPING
    assert not model.training
    assert apart(logits(model), logits(dense)) < 1e-4
    assert "bits=4, group=32, asymmetric, inputs reordered" in repr(layers(model)[0])
    model = llmq.load(str(tmp_path / "m"))
    assert layers(model)


def test_load_of_an_unquantized_folder(tmp_path: Path) -> None:
    dense = tiny()
    dense.save_pretrained(tmp_path / "m")
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert not layers(model)
    assert torch.equal(logits(model), logits(dense))


def test_undone(tmp_path: Path) -> None:
    tables = (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    write(tmp_path / "ct", Case("ct"))
    write(tmp_path / "gptq", Case("gptq"))
    use_kernels()
    use_kernels()
    assert layers(AutoModelForCausalLM.from_pretrained(tmp_path / "ct"))
    with pytest.raises(llmq.LlmqError):
        llmq.load(tmp_path)
    assert layers(AutoModelForCausalLM.from_pretrained(tmp_path / "gptq")), "load leaves use_kernels as it was"
    use_kernels(False)
    use_kernels(False)
    for table, old in zip(tables, before, strict=True):
        assert list(table) == list(old)
        assert all(table[key] is old[key] for key in old)
    assert not layers(AutoModelForCausalLM.from_pretrained(tmp_path / "ct"))
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "gptq")


def test_a_method_that_transformers_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader is all it takes; without kernels, and for what the reader refuses, the folder is refused."""
    write(tmp_path / "m", Case("gptq"))
    wanted = logits(llmq.load(tmp_path / "m", device_map="cpu", dtype="float32"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "made-up", "format": "gptq"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(formats, "readers", lambda: {"made-up": (GPTQReader,)})
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert layers(model) and torch.equal(logits(model), wanted)
    assert "made-up" not in AUTO_QUANTIZER_MAPPING and "made-up" not in AUTO_QUANTIZATION_CONFIG_MAPPING
    with pytest.raises(llmq.LlmqError, match="'made-up'.*random weights: --kernels"):
        load_model(tmp_path / "m")
    config["quantization_config"]["bits"] = 5
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(llmq.LlmqError, match="made-up: it has 5 bits.*transformers does not know made-up"):
        llmq.load(tmp_path / "m", device_map="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("ct", 4, 32, True), Case("gptq", 3, 32, True, True)], ids=str)
def test_compiled_and_generating(case: Case, tmp_path: Path) -> None:
    write(tmp_path / "m", case, layers=1)
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    wanted = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if case.kind == "ct" else "aot_eager")
    assert apart(logits(compiled), wanted) < 1e-5
    made = model.generate(TOKENS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    step = TOKENS
    for _ in range(5):
        with torch.inference_mode():
            step = torch.cat((step, model(step).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, step)


def test_adapters_train(tmp_path: Path) -> None:
    """peft finds the layers, and adapters get the gradients that they get on dense weights."""
    peft = pytest.importorskip("peft")
    dense = write(tmp_path / "m", Case("gptq", 4, 32, True, True))
    grads = []
    for model in (llmq.load(tmp_path / "m", device_map="cpu", dtype="float32"), dense):
        torch.manual_seed(0)
        wanted = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(model, wanted)
        adapted(TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 2 * 7 * 2
    for name, grad in grads[0].items():
        assert grads[1][name].abs().max() > 0
        assert apart(grad, grads[1][name]) < 1e-4, name


def test_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "m", Case("gptq"))
    model = llmq.load(tmp_path / "m", device_map="cpu")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "copy")
    assert "copy the folder" in caplog.text
    assert not (tmp_path / "copy").exists()


def test_moved(tmp_path: Path) -> None:
    """A cast leaves what the codes mean alone; a layout that was made for a device stays there."""
    write(tmp_path / "m", Case("ct", 8, 32, True))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    layer = layers(model)[0]
    assert isinstance(layer, IntLinear)
    assert layer.layout == layouts.DENSE_BITS
    x, scale = torch.randn(2, layer.in_features), layer.scale.clone()
    wanted = layer(x)
    layer.to(torch.bfloat16)
    # Packed for bfloat16, where torch has an operator, scales are rounded to it.
    kept = layer.scale if layer.layout == layouts.DENSE_BITS else layer.scale.t()
    assert torch.equal(kept, scale.to(kept.dtype))
    assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    assert apart(layer(x.to(torch.bfloat16)).float(), wanted) < 1e-2
    assert layer(x).dtype == torch.float32, "as bitsandbytes does: an input of another dtype gets an output of its own"
    layer.layout = "int4pack"
    with pytest.raises(llmq.LlmqError, match="packed as int4pack for torch.bfloat16"):
        layer.to(torch.float16)
    layer.to("meta")


def test_moved_to_where_a_faster_layout_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", Case("ct", 4, 32, True))
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "NAMES", (layouts.DENSE_BITS,))
        layer = layers(llmq.load(tmp_path / "m", device_map="cpu", dtype="float32"))[0]
    assert isinstance(layer, IntLinear)
    x = torch.randn(2, layer.in_features)
    wanted = layer(x)
    layer.to(torch.bfloat16)
    best, _ = layouts.choose(x.device, torch.bfloat16, 4, layer.out_features, layer.in_features, 32)
    assert layer.layout == best
    assert apart(layer(x), wanted) < 1e-2


def test_parts_heads_and_devices(tmp_path: Path, kernels: None) -> None:
    """The base model alone, with another head, and sent over several devices, whose hooks stay on the layers."""
    dense = write(tmp_path / "m", Case("gptq", 4, 32, True, True))
    with torch.inference_mode():
        wanted = dense.model(TOKENS).last_hidden_state
        parts = {"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu", "layers": torch.device("cpu")}
        spread = {f"model.{name}": device for name, device in parts.items()} | {"lm_head": "cpu"}
        for kind, device_map in (
            (AutoModel, None),
            (AutoModelForSequenceClassification, None),
            (AutoModelForCausalLM, spread),
        ):
            model = kind.from_pretrained(tmp_path / "m", dtype=torch.float32, device_map=device_map)
            base = getattr(model, "model", model)
            assert apart(base(TOKENS).last_hidden_state, wanted) < 1e-4
            assert hasattr(layers(model)[0], "_hf_hook") == (device_map is not None)
    with pytest.raises(llmq.LlmqError, match="its device map has cpu, disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=spread | {"model.layers": "disk"})


def test_plain_operator_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that no fast layout serves run anyway, with one line for all of them."""
    for bits in (8, 4):
        write(tmp_path / str(bits), Case("ct", bits, 32))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llmq"):
            model = llmq.load(tmp_path / str(bits), device_map="cpu")
        lines = [r.getMessage() for r in caplog.records if r.name == "llmq"]
        plain = [layer for layer in layers(model) if layer.layout == layouts.DENSE_BITS]
        assert bits == 4 or len(plain) == len(layers(model))
        assert len(lines) == bool(plain)
        assert all(line.startswith(f"{len(plain)} weights run on the plain operator") for line in lines)


def without(suffix: str) -> Any:
    def change(state: Tensors) -> None:
        for name in [n for n in state if n.endswith(f"layers.1.mlp.up_proj.{suffix}")]:
            del state[name]

    return change


def with_other(suffix: str, tensor: torch.Tensor) -> Any:
    return lambda state: state.update({f"model.layers.1.mlp.up_proj.{suffix}": tensor})


BROKEN = [
    (Case("gptq"), without("qzeros"), r"model.layers.1.mlp.up_proj.qzeros is missing.*int32 \[2, 16\]"),
    (Case("gptq"), without("scales"), "up_proj.scales is missing"),
    (Case("gptq", order=True), without("g_idx"), "model.layers.1.mlp.up_proj.g_idx is missing"),
    (Case("ct", order=True), without("weight_g_idx"), "model.layers.1.mlp.up_proj.weight_g_idx is missing"),
    (Case("gptq"), with_other("scales", torch.ones(3, 128)), r"up_proj.scales must be .* \[2, 128\].*\[3, 128\]"),
    (Case("gptq"), with_other("scales", torch.ones(2, 128, dtype=torch.int32)), "up_proj.scales must be .*not int32"),
    (Case("gptq"), with_other("g_idx", torch.zeros(64, dtype=torch.int32)), "up_proj: g_idx must give every group 32"),
    (Case("gptq"), with_other("g_idx", torch.arange(64, dtype=torch.int32) // 32 - 1), "some are negative"),
    (Case("awq", zeros=True), with_other("qweight", torch.ones(64, 16)), "up_proj.qweight must be int32"),
    (Case("awq", zeros=True), without("qweight"), "up_proj has .*scales.*, but no weight"),
    (Case("ct"), without("weight_packed"), "up_proj.weight_packed is missing"),
    (Case("ct"), without("weight_scale"), "up_proj.weight_scale is missing"),
    (Case("ct"), with_other("weight_shape", torch.tensor([64, 128])), r"weight_shape says \[64, 128\]"),
]


@pytest.mark.parametrize("case, change, message", BROKEN, ids=lambda value: str(value)[:40])
def test_damaged_folders(case: Case, change: Any, message: str, tmp_path: Path, kernels: None) -> None:
    write(tmp_path / "m", case)
    edit(tmp_path / "m", change)
    with pytest.raises(llmq.LlmqError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "case, key, value, message",
    [
        (Case("gptq", 4), "bits", 8, r"qweight must be int32 \[\d+, \d+\]"),
        (Case("gptq", 4), "group_size", 16, "(qzeros|scales) must be"),
        (Case("awq", 4, zeros=True), "group_size", 64, "(qzeros|scales) must be"),
        (Case("ct", 4), "num_bits", 3, "weight_packed must be"),
        (Case("ct", 4), "group_size", 64, "weight_scale must be"),
        (Case("ct", 4), "symmetric", False, "weight_zero_point is missing"),
        (Case("ct", 4), "ignore", ["re:.*up_proj"], "model.layers.0.mlp.up_proj is not quantized, but"),
        (Case("gptq", 4), "dynamic", {"-:.*up_proj": {}}, "model.layers.0.mlp.up_proj is not quantized"),
    ],
)
def test_configurations_that_disagree(
    case: Case, key: str, value: Any, message: str, tmp_path: Path, kernels: None
) -> None:
    write(tmp_path / "m", case)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    own = config["quantization_config"]
    weights = own["config_groups"]["group_0"]["weights"] if case.kind == "ct" and key != "ignore" else own
    weights[key] = value
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(llmq.LlmqError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path / "m", Case("gptq"), shards=2)
    file = tmp_path / "m" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(llmq.LlmqError, match="model-00002-of-00002.safetensors is truncated"):
        llmq.load(tmp_path / "m", device_map="cpu")


def test_a_config_that_is_quantized_while_the_files_are_not(tmp_path: Path) -> None:
    write(tmp_path / "m", Case("ct"))
    save(tmp_path / "m", dict(tiny().state_dict()))
    with pytest.raises(llmq.LlmqError, match="is an ordinary float32 tensor without scales"):
        llmq.load(tmp_path / "m", device_map="cpu")


def test_mixed_widths(tmp_path: Path) -> None:
    """gptqmodel's `dynamic`: some weights have other settings than the rest."""
    dense = write(tmp_path / "m", Case("gptq", 4))
    eight = write(tmp_path / "other", Case("gptq", 8))
    name = "model.layers.1.mlp.up_proj"
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "other" / "model.safetensors")
    edit(tmp_path / "m", lambda state: state.update({k: v for k, v in stored.items() if k.startswith(f"{name}.")}))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*\.1\.mlp\.up_proj": {"bits": 8}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    dense.get_submodule(name).weight.data = eight.get_submodule(name).weight.data
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert apart(logits(model), logits(dense)) < 1e-4
