"""What llmq writes, on its kernels, against stock transformers reading the same folder; and what goes to stock."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

import llmq
from llmq import job
from llmq.grids.scheme import Activations, Scheme
from llmq.inference.transformers_hook import use_kernels
from llmq.recipe.recipe import Recipe
from tests.llmq.blocks import ids, write
from tests.llmq.inference.test_transformers_hook import apart, layers
from tests.llmq.written import Case, edit
from tests.llmq.written import write as write_case

IDS = torch.randint(10, 250, (2, 20), generator=torch.Generator().manual_seed(9))
SCHEMES = {
    "w4": Scheme(4, 32),
    "w3-asymmetric": Scheme(3, 32, symmetric=False),
    "w2-channel": Scheme(2, None),
    "w8a8": Scheme(8, None, activations=Activations()),
    "w8a8-static": Scheme(8, None, activations=Activations(dynamic=False)),
    "fp8": Scheme(8, None, grid="fp8", activations=Activations()),
    "fp8-static": Scheme(8, None, grid="fp8", activations=Activations(dynamic=False)),
    "nf4": Scheme(4, 64, grid="nf4"),
    "nf4-double": Scheme(4, 64, grid="nf4", double_quant=True),
}


@pytest.fixture
def kernels() -> Any:
    """from_pretrained on kernels for one test."""
    use_kernels()
    yield
    use_kernels(False)


def quantized(kind: str, scheme: Scheme, folder: Path) -> Path:
    """A tiny model of a type, quantized by llmq."""
    recipe = Recipe(methods=("nf4" if scheme.grid == "nf4" else "rtn",), scheme=scheme)
    job.quantize(str(write(kind, folder / "source")), folder / "out", recipe, ids=ids())
    return folder / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def stock(folder: Path) -> Any:
    """The folder as stock transformers reads it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()  # out of training bitsandbytes multiplies in bfloat16 on a CPU
    logits(model)  # compressed-tensors unpacks at the first forward
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_stock_reads_it(scheme: str, tmp_path: Path) -> None:
    folder = quantized("llama", SCHEMES[scheme], tmp_path)
    plain, model = stock(folder), llmq.load(folder, device_map="cpu", dtype="float32")
    assert not layers(plain)
    names = [name for name, module in model.named_modules() if isinstance(module, llmq.QuantLinear)]
    assert len(names) == 28
    for name in names:
        layer = model.get_submodule(name)
        x = torch.randn(2, 5, layer.in_features)
        assert apart(layer(x), plain.get_submodule(name)(x)) < 1e-5, name
    # A value half-way between two codes of an activation goes one way or the other by the last bit of a sum.
    assert apart(logits(model), logits(plain)) < (3e-2 if SCHEMES[scheme].activations else 1e-4)
    assert model.get_memory_footprint() < 1.25 * sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind, scheme", [("opt", "w4"), ("phi3", "nf4-double"), ("gemma2", "w4"), ("mamba", "w4")])
def test_other_architectures(kind: str, scheme: str, tmp_path: Path) -> None:
    """Fused weights, other names: the files decide."""
    folder = quantized(kind, SCHEMES[scheme], tmp_path)
    model = llmq.load(folder, device_map="cpu", dtype="float32")
    assert layers(model)
    assert apart(logits(model), logits(stock(folder))) < 1e-4


@pytest.mark.parametrize("kind, levels", [("gpt2", "nf4"), ("llama", "fp4")])
def test_what_bitsandbytes_writes(kind: str, levels: str, tmp_path: Path) -> None:
    """Transposed weights (gpt2's Conv1D), FP4, bytes held in another dtype."""
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=levels,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float16 if levels == "fp4" else torch.uint8,
    )
    made = AutoModelForCausalLM.from_pretrained(write(kind, tmp_path / "source"), quantization_config=options)
    made.save_pretrained(tmp_path / "out")
    model = llmq.load(tmp_path / "out", device_map="cpu", dtype="float32")
    assert layers(model)
    assert apart(logits(model), logits(stock(tmp_path / "out"))) < 1e-4


@pytest.mark.parametrize("safe", [True, False])
def test_merging_into_integers_fails(safe: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llmq.load(quantized("llama", SCHEMES["w8a8"], tmp_path), device_map="cpu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload(safe_merge=safe)


def test_what_is_not_served_goes_to_stock(tmp_path: Path, kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    """FP8 weights alone, what the user wants dense, what is quantized while loading: one line, and stock's result."""
    eight = quantized("llama", Scheme(8, None, grid="fp8"), tmp_path / "fp8")
    four = quantized("llama", SCHEMES["w4"], tmp_path / "w4")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (eight, {}, "it does not round activations"),
        (four, {"quantization_config": CompressedTensorsConfig(dequantize=True)}, "asks for dense weights"),
        (
            tmp_path / "w4" / "source",
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
            "quantized while it is loaded",
        ),
    ]
    for folder, options, reason in cases:
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
        assert not layers(model)
        assert [r.getMessage() for r in caplog.records if r.name == "llmq" and reason in r.getMessage()]
        found = logits(model)
        use_kernels(False)
        assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)))
        use_kernels()


def test_weights_of_what_is_no_linear_module_go_to_stock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left of llmq's quantizer then: what comes out is what stock makes of the folder, an error included."""
    write("qwen3_moe", tmp_path / "m")
    name = "model.embed_tokens"

    def pack(state: dict[str, torch.Tensor]) -> None:
        rows, width = state.pop(f"{name}.weight").shape
        state |= {
            f"{name}.qweight": torch.zeros(width // 8, rows, dtype=torch.int32),
            f"{name}.qzeros": torch.zeros(width // 32, rows // 8, dtype=torch.int32),
            f"{name}.scales": torch.ones(width // 32, rows),
        }

    edit(tmp_path / "m", pack)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(llmq.LlmqError, match="optimum"), caplog.at_level(logging.WARNING, "llmq"):
        llmq.load(tmp_path / "m", device_map="cpu")
    assert "which is no linear module" in caplog.text


def test_old_activation_order_of_compressed_tensors(tmp_path: Path) -> None:
    """compressed-tensors 0.20 no longer reads 'actorder: group'; the files say the groups all the same."""
    dense = write_case(tmp_path / "m", Case("ct", 4, 32, True, order=True))
    model = llmq.load(tmp_path / "m", device_map="cpu", dtype="float32")
    assert apart(logits(model), logits(dense)) < 1e-4
