"""The exported model of every format that llmq writes: stock's logits are llmq.load's; other folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmq
from llmq.checkpoint.sink import Sink
from llmq.errors import LlmqError
from llmq.export.dense import export_dense
from llmq.export.folder import QuantizedFolder
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Recipe
from tests.llmq.blocks import apart
from tests.llmq.grids.peers import known_to_compressed_tensors
from tests.llmq.refusal import refused

IDS = torch.arange(24).view(2, 12)
SCHEMES = [
    Scheme(4, 32),
    Scheme(3, 32, symmetric=False),
    Scheme(8, None, activations=Activations(dynamic=False)),
    Scheme(2, 32, grid="ternary"),
    Scheme(2, 32, grid="ternary", packing="llmq"),
    Scheme(4, 64, grid="nf4", double_quant=True),
    Scheme(8, None, grid="fp8"),
    Scheme(4, 16, grid="nvfp4"),
    Scheme(6, 32, grid="mxfp6"),
    Scheme(2, 8, grid="vq"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    made = tmp_path_factory.mktemp("export")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(made / str(dtype))
    return {dtype: made / str(dtype) for dtype in (torch.float32, torch.bfloat16)}


def quantized(source: Path, out: Path, scheme: Scheme, **more: Any) -> Path:
    llmq.quantize(str(source), out, Recipe(methods=("rtn",), scheme=scheme, **more), ids=IDS)
    return out


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_stock_gives_the_logits_of_the_quantized_folder(
    scheme: Scheme, sources: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    known_to_compressed_tensors(scheme)
    # Folders that stock transformers reads for llmq.load are read in bfloat16.
    dtype = torch.bfloat16 if scheme.rules.layout else torch.float32
    out = quantized(sources[dtype], tmp_path / "out", scheme)
    export_dense(str(out), tmp_path / "dense")
    names = {name for file in sources[dtype].glob("*.safetensors") for name in load_file(file)}
    stored = {k: v for file in (tmp_path / "dense").glob("*.safetensors") for k, v in load_file(file).items()}
    assert stored.keys() == names and {tensor.dtype for tensor in stored.values()} == {dtype}
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    stock = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval())
    want = logits(llmq.load(out, device_map="cpu").eval())
    assert stock.dtype == want.dtype == dtype
    if scheme.activations is not None:
        assert apart([stock], [want]) < 1e-2  # rounded inputs are not part of an exported model
        return
    most = 1e-5 if dtype == torch.float32 else 1e-2
    assert apart([stock], [want]) < most < apart([stock], [logits(LlamaForCausalLM.from_pretrained(sources[dtype]))])


def test_a_killed_export_resumes(
    sources: dict[torch.dtype, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized(sources[torch.float32], tmp_path / "out", Scheme(2, 32, grid="ternary", packing="llmq"))
    monkeypatch.setattr("llmq.export.dense.UNIT_BYTES", 1 << 14)
    export_dense(str(out), tmp_path / "whole")
    commit, done = Sink.commit, []

    def killed(sink: Sink, unit: str, *rest: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit)
        commit(sink, unit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Sink, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        export_dense(str(out), tmp_path / "broken")
    monkeypatch.setattr(Sink, "commit", commit)
    export_dense(str(out), tmp_path / "broken")
    ends = (".safetensors", ".json")
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.suffix in ends}
        for name in ("whole", "broken")
    )
    assert len(one) > 4 and one == other


def test_scales_of_a_rounded_cache_are_left_out(sources: dict[torch.dtype, Path], tmp_path: Path) -> None:
    out = quantized(sources[torch.float32], tmp_path / "out", Scheme(4, 32), kv_cache="fp8")
    export_dense(str(out), tmp_path / "dense")
    for folder, count in ((out, 2), (tmp_path / "dense", 0)):
        names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
        assert sum(name.endswith((".k_scale", ".v_scale")) for name in names) == count
    assert not any("_scale" in name and "self_attn.k_s" in name for name in QuantizedFolder(out).others)


def test_what_is_not_exported(sources: dict[torch.dtype, Path], tmp_path: Path) -> None:
    source = sources[torch.float32]
    refused(lambda: export_dense(str(source), tmp_path / "a"), str(source), "is not quantized")
    out = quantized(sources[torch.float32], tmp_path / "out", Scheme(4, 32))
    config = json.loads((out / "config.json").read_text())
    wrong = (({"quant_method": "gptq"}, "quantized with gptq"), ({"format": "llmq-x"}, "packed one by one"))
    for changes, told in wrong:
        changed = config | {"quantization_config": config["quantization_config"] | changes}
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(LlmqError, match=f"{out}.*{told}"):
            export_dense(str(out), tmp_path / "b")
    assert not (tmp_path / "b").exists()
