"""bitsandbytes on disk: the bytes are those transformers writes itself, and it reads ours as the weights we meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.formats.bitsandbytes import write as bnb
from llmq.grids.nf4 import quantize_nf4
from llmq.grids.scheme import Activations, Scheme

pytest.importorskip("bitsandbytes")

IDS = torch.arange(24).view(2, 12)
BOTH = pytest.mark.parametrize("double_quant", [False, True])


def scheme(double_quant: bool, size: int = 64) -> Scheme:
    return Scheme(4, size, grid="nf4", double_quant=double_quant)


def stock(double_quant: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits
    return found


def rewrite(source: Path, folder: Path, double_quant: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Writes a model with its linear weights in NF4; the dense model that it should be."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            q = quantize_nf4(module.weight.data, scheme(double_quant))
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{suffix}": value for suffix, value in bnb.pack(q).items()}
            module.weight.data = q.dequantize(dtype)
            names.append(name)
    folder.mkdir()
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text())
    written["quantization_config"] = bnb.config({scheme(double_quant): names}, ["lm_head"], dtype)
    file.write_text(json.dumps(written))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_loader_gives_our_logits(
    tiny_model: Path, tmp_path: Path, double_quant: bool, dtype: torch.dtype
) -> None:
    dense = rewrite(tiny_model, tmp_path / "q", double_quant, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("proj")} == {"Linear4bit"}
    assert model.dtype == dtype and type(model.lm_head) is nn.Linear
    # Training mode is the reader's exact path on every CPU; this model has no dropout.
    assert torch.equal(logits(model.train()), logits(dense))
    # In evaluation it multiplies in bfloat16 where the CPU can, whatever the model's dtype.
    want, got = logits(dense).double(), logits(model.eval()).double()
    assert float((got - want).norm() / want.norm()) < 0.05


@BOTH
def test_transformers_writes_the_same_tensors(tiny_model: Path, tmp_path: Path, double_quant: bool) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.bfloat16, quantization_config=stock(double_quant)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    rewrite(tiny_model, tmp_path / "ours", double_quant, torch.bfloat16)
    want = load_file(tmp_path / "theirs" / "model.safetensors")
    got = load_file(tmp_path / "ours" / "model.safetensors")
    assert got.keys() == want.keys() and any(bnb.STATE in name for name in got)
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    read = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"] == read


@BOTH
def test_the_config_is_the_one_transformers_makes(double_quant: bool) -> None:
    assert bnb.config({scheme(double_quant): ["a"]}, ["lm_head"]) == stock(double_quant).to_dict()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spec_pack_unpack(double_quant: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    q = quantize_nf4(weight, scheme(double_quant), dtype)
    tensors = bnb.pack(q)
    want = bnb.spec(weight.shape, q.scheme, dtype)
    found = {suffix: (value.dtype, tuple(value.shape)) for suffix, value in tensors.items()}
    (kind, (size,)), (_, (most,)) = found.pop(bnb.STATE), want.pop(bnb.STATE)
    assert found == want and kind == torch.uint8
    assert most - 10 < size <= most if double_quant else size == most
    back = bnb.unpack(tensors, q.scheme)
    assert torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))
    assert (back.shape, back.dtype, back.scheme) == (q.shape, dtype, q.scheme)
    assert all(torch.equal(value, tensors[suffix]) for suffix, value in bnb.pack(back).items())


def test_refusals() -> None:
    with pytest.raises(LlmqError, match="64 does not divide the 96 inputs"):
        bnb.spec((8, 96), scheme(False), torch.bfloat16)
    with pytest.raises(LlmqError, match="nothing is quantized"):
        bnb.config({scheme(False): []}, [])
    with pytest.raises(LlmqError, match="one scheme"):
        bnb.config({scheme(False): ["a"], scheme(True): ["b"]}, [])
    tensors = bnb.pack(quantize_nf4(torch.randn(8, 64), scheme(False)))
    with pytest.raises(LlmqError, match="nested_absmax, weight.nested_quant_map, not in the checkpoint"):
        bnb.unpack(tensors, scheme(True))
    with pytest.raises(LlmqError, match="blocks of 64, not"):
        bnb.unpack(tensors, scheme(False, 128))
    with pytest.raises(LlmqError, match=r"weight.absmax .* must be torch.float32 \[8\]"):
        bnb.unpack(tensors | {bnb.ABSMAX: torch.ones(3)}, scheme(False))
    assert bnb.refusal(scheme(True)) is None
    for wrong in (Scheme(4, 64), Scheme(8, None, activations=Activations())):
        assert bnb.refusal(wrong) is not None


def test_a_name_to_skip_must_not_reach_further() -> None:
    """transformers also skips every module whose name ends in, starts with, or matches one that is listed."""
    assert bnb.config({scheme(False): ["a.head_norm"]}, ["head"])["llm_int8_skip_modules"] == ["head"]
    for skipped, hit in (("head", "a.head"), ("a", "a.b"), ("a.1.x", "a.1.x.y"), ("x.down", "a.x.down")):
        with pytest.raises(LlmqError, match=f"{hit}"):
            bnb.config({scheme(False): [hit]}, [skipped])
