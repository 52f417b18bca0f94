"""llmq's own folder: every code survives, stock transformers refuses it, llmq.load computes with the stored levels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.export.dense import export_dense
from llmq.formats import codebook
from llmq.formats.codebook import learned
from llmq.formats.dequantized import open_source
from llmq.formats.inspection import inspect_folder
from llmq.grids.scheme import Scheme
from llmq.inference.layer import QuantLinear
from llmq.inference.pretrained import load_model
from llmq.inference.stack import StackedLinear
from llmq.report.terminal import scheme
from tests.llmq import mixtures

IDS = torch.arange(24).view(2, 12)
SHARED = Scheme(4, None, grid="kmeans", level_rows=5)


def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe = llmq.Recipe(
        methods=("rtn",),
        scheme=Scheme(3, None, grid="kmeans"),
        overrides=(("*down_proj", SHARED),),
    )
    llmq.quantize(str(tmp_path / "source"), tmp_path / "out", recipe)
    return tmp_path / "out"


def stored_in(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_folder(tmp_path: Path) -> None:
    out = folder(tmp_path)
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(Exception, match="llmq-codebook"):
            kind.from_pretrained(out)
    tensors = stored_in(out)
    stem = "model.layers.1.mlp.down_proj"
    assert {f"{stem}.{suffix}" for suffix in learned.SUFFIXES} <= tensors.keys()

    model = llmq.load(out, device_map="cpu", dtype="float32")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    for name, module in dense.named_modules():
        if f"{name}.weight_codes" in tensors:
            parts = (*learned.SUFFIXES, learned.SCALE)
            stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in parts if f"{name}.{suffix}" in tensors}
            held = SHARED if name.endswith("down_proj") else Scheme(3, None, grid="kmeans")
            module.weight.data = codebook.unpack(stored, held).dequantize(torch.float32)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)

    plain = load_model(out)  # as `llmq eval` opens it
    torch.testing.assert_close(plain(IDS).logits, dense(IDS).logits, rtol=1e-2, atol=1e-3)
    source = open_source(out)
    assert torch.equal(source.read(f"{stem}.weight"), dense.get_submodule(stem).weight.to(torch.bfloat16))
    assert torch.equal(source.read_rows(f"{stem}.weight", 3, 9), source.read(f"{stem}.weight")[3:9])

    rows = {row.name: row for row in inspect_folder(out).rows if row.bits is not None}
    assert len(rows) == 14 and not inspect_folder(out).unknown
    assert {(row.kind, row.bits) for row in rows.values()} == {("codebook", 3), ("codebook", 4)}
    assert scheme(rows[f"{stem}.weight"]) == "codebook4 channel (levels of 5 rows)"
    assert tensors[f"{stem}.weight_levels"].shape == (7, 16) and tensors[f"{stem}.weight_scale"].shape == (32, 1)

    text = json.loads((out / "report.json").read_text())
    assert any("only llmq reads it" in warning for warning in text["warnings"])
    config = (out / "config.json").read_text()
    for rows_told, told in (
        ('"level_rows": 6', "levels of 5 rows, and config.json says 6"),
        ('"level_row": 5', "says 1"),
    ):
        (out / "config.json").write_text(config.replace('"level_rows": 5', rows_told))
        with pytest.raises(LlmqError, match=rf"down_proj.weight_codes does not fit: .*{told}"):
            open_source(out)
        with pytest.raises(LlmqError, match="down_proj"):
            llmq.load(out, device_map="cpu")


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    out = folder(tmp_path)
    tensors = stored_in(out)
    name = "model.layers.0.self_attn.q_proj.weight_levels"
    file = next(file for file in out.glob("*.safetensors") if name in load_file(file))
    save_file({k: v for k, v in load_file(file).items() if k != name}, file, {"format": "pt"})
    with pytest.raises(LlmqError, match=r"q_proj\.weight_levels is missing"):
        llmq.load(out, device_map="cpu")
    scheme = Scheme(3, None, grid="kmeans")
    parts = {suffix: tensors[f"model.layers.0.mlp.up_proj.{suffix}"] for suffix in learned.SUFFIXES}
    with pytest.raises(LlmqError, match="weight_levels of a"):
        codebook.unpack(parts | {codebook.LEVELS: parts[codebook.LEVELS][:, :4]}, scheme)
    with pytest.raises(LlmqError, match="not in the checkpoint"):
        codebook.unpack({}, scheme)


TERNARY = Scheme(2, 16, grid="ternary", packing="llmq")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of codes."""
    made = tmp_path_factory.mktemp("mixed")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made / "source")
    others = {"o": Scheme(2, None, grid="binary", packing="llmq"), "down": Scheme(4, 16, grid="apot")}
    others["up"], others["gate"] = Scheme(3, None, grid="kmeans"), Scheme(4, None, grid="log")
    overrides = tuple((f"*{name}_proj", scheme) for name, scheme in others.items())
    recipe = llmq.Recipe(methods=("rtn",), scheme=TERNARY, overrides=overrides, loader="transformers")
    llmq.quantize(str(made / "source"), made / "out", recipe)
    return made / "out"


def test_a_folder_of_all_kinds(mixed: Path, tmp_path: Path) -> None:
    """Stock refuses it; what llmq.load computes packed, and dense, is what the exported folder gives in stock."""
    with pytest.raises(Exception, match="llmq-codebook"):
        AutoModelForCausalLM.from_pretrained(mixed)
    export_dense(str(mixed), tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    packed = llmq.load(mixed, device_map="cpu", dtype="float32")
    kinds = [type(module).__name__ for _, module in packed.named_modules() if isinstance(module, QuantLinear)]
    assert {*kinds} == {"VectorsLinear", "CodebookLinear", "LevelsLinear"} and len(kinds) == 14
    torch.testing.assert_close(packed(IDS).logits, stock(IDS).logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(load_model(mixed)(IDS).logits, stock(IDS).logits, rtol=1e-2, atol=1e-3)
    rows = {row.name: row for row in inspect_folder(mixed).rows if row.bits is not None}
    assert len(rows) == 14 and not inspect_folder(mixed).unknown
    row = rows["model.layers.0.self_attn.q_proj.weight"]
    assert scheme(row) == "codebook2 g16 (3 levels, 1.58 bits of information, stored in 1.6)"
    assert scheme(rows["model.layers.0.self_attn.o_proj.weight"]) == "codebook1 channel"
    assert scheme(rows["model.layers.1.mlp.gate_proj.weight"]).startswith("codebook4 channel (15 levels, 3.91")
    text = (mixed / "report.json").read_text()
    assert "1.58 bits of information, stored in 1.6" in (mixed / "README.md").read_text() and "packing" in text
    # Whatever reads models reads it, as its dense twin.
    for name in ("mixed", "dense"):
        at = mixed if name == "mixed" else tmp_path / "dense"
        llmq.quantize(str(at), tmp_path / f"{name}-again", llmq.Recipe(methods=("rtn",), scheme=Scheme(4, 16)))
    one, other = (stored_in(tmp_path / f"{name}-again") for name in ("mixed", "dense"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("num_bits", 4, "and config.json says 4 bits"), ("group_size", 32, "config.json says groups of 32")],
)
def test_config_and_tensors_must_agree(mixed: Path, tmp_path: Path, key: str, value: int, told: str) -> None:
    """Wherever the folder is read: packed, dense, or only listed."""
    out = shutil.copytree(mixed, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    (mine,) = (group for group in groups if group["weights"]["grid"] == "ternary")
    mine["weights"][key] = value
    (out / "config.json").write_text(json.dumps(config))
    for read in (lambda: open_source(out), lambda: load_model(out), lambda: export_dense(str(out), tmp_path / "dense")):
        with pytest.raises(LlmqError, match=rf"weight_trits does not fit: .*{told}"):
            read()
    with pytest.raises(LlmqError, match=rf"{out}"):
        llmq.load(out, device_map="cpu")
    unknown = inspect_folder(out).unknown
    assert len(unknown) == 6 and told in unknown[0].why


def test_damaged_codes_are_refused_when_they_are_read(mixed: Path, tmp_path: Path) -> None:
    out, name = shutil.copytree(mixed, tmp_path / "out"), "model.layers.0.self_attn.q_proj.weight_trits"
    file = next(file for file in out.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][3, 1] = 250
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LlmqError, match=rf"{file}: {name} is damaged: a byte is 250"):
        open_source(out).read(name.replace("weight_trits", "weight"))
    with pytest.raises(LlmqError, match="a byte is 250"):
        llmq.load(out, device_map="cpu")


def test_experts_stay_packed(tmp_path: Path) -> None:
    """Each as any weight; stock refuses the folder."""
    source = mixtures.write("qwen3_moe", tmp_path / "source")
    llmq.quantize(str(source), tmp_path / "out", llmq.Recipe(methods=("rtn",), scheme=TERNARY), ids=IDS + 10)
    export_dense(str(tmp_path / "out"), tmp_path / "dense")
    packed = llmq.load(tmp_path / "out", device_map="cpu")
    stacks = [module for module in packed.modules() if isinstance(module, StackedLinear)]
    assert stacks
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(packed(IDS + 10).logits, stock(IDS + 10).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(Exception, match="llmq-codebook"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
