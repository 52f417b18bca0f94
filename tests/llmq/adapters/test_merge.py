"""Merging: against PEFT's own merge, against stock bitsandbytes, as any source of the quantize job; what is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer import Typer
from typer.testing import CliRunner

from llmq.checkpoint.source import FolderSource

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import llmq
from llmq.adapters.lora import Adapter
from llmq.adapters.merge import merge
from llmq.adapters.merged import Merged, open_base
from llmq.cli import adapters as cli_adapters
from llmq.cli import app as cli
from llmq.formats.bitsandbytes.source import NF4Source
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused

RTN = Recipe(methods=("rtn",), scheme=Scheme(4, 32))


def nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def write_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter of random numbers on every linear layer, written by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    )
    model = get_peft_model(load(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "plain", tiny_model)


@pytest.fixture(scope="module")
def turned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers keep their weights as [in, out], square ones among them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "turned"
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=256, n_positions=64)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"layers.0.*.up_proj": 32}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_as_peft_merges(tmp_path: Path, tiny_model: Path, options: dict[str, Any]) -> None:
    from peft import PeftModel

    folder = write_adapter(tmp_path / "adapter", tiny_model, **options)
    check(Merged(FolderSource(tiny_model), Adapter(folder)), PeftModel.from_pretrained(load(tiny_model), folder))


def test_as_peft_merges_weights_stored_transposed(tmp_path: Path, turned_model: Path) -> None:
    from peft import PeftModel

    folder = write_adapter(tmp_path / "adapter", turned_model, fan_in_fan_out=True)
    check(Merged(FolderSource(turned_model), Adapter(folder)), PeftModel.from_pretrained(load(turned_model), folder))


def check(merged: Merged, model: Any) -> None:
    """Every tensor of the merged source is the parameter of PEFT's merged model that it fills, and some differ."""
    expected = model.merge_and_unload().state_dict()
    changed = 0
    for name in merged.names():
        value = merged.read(name)
        key = name if name in expected else f"transformer.{name}"
        assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-6), name
        changed += not torch.equal(value, merged.base.read(name))
        assert torch.equal(merged.read_rows(name, 1, 3), value[1:3])
    assert changed == len(merged.adapter.factors)


@pytest.mark.parametrize("kind", ["tiny_model", "turned_model"])
def test_trained_on_nf4(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    """The weights that stock transformers and bitsandbytes compute with, and the adapter's change added to them."""
    import bitsandbytes as bnb

    base: Path = request.getfixturevalue(kind)
    folder = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj", "c_fc"])
    merged = Merged(FolderSource(base), Adapter(folder), "nf4")
    plain = Merged(FolderSource(base), Adapter(folder), "base")
    model = load(base, quantization_config=nf4())
    modules = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    rounded = {n.removeprefix("transformer."): n for n in modules}
    assert len(merged.changes) == len(modules) > len(merged.adapter.factors)
    for name, change in merged.changes.items():
        module = modules[rounded[name.removesuffix(".weight").removeprefix("transformer.")]]
        value = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        value = value.t() if change.transposed else value
        delta = 0.0 if change.factors is None else plain.exact(name)[0] - FolderSource(base).read(name)
        assert torch.allclose(merged.read(name), value + delta, rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(merged.read(name), plain.read(name), atol=1e-3)


def test_an_nf4_folder_is_a_base(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    """It is read as what its codes stand for: the same model as its unquantized base through NF4."""
    load(tiny_model, quantization_config=nf4()).save_pretrained(tmp_path / "nf4")
    source = open_base(tmp_path / "nf4")
    assert isinstance(source, NF4Source)
    assert sorted(source.names()) == sorted(FolderSource(tiny_model).names())
    there, then = Merged(source, Adapter(adapter)), Merged(FolderSource(tiny_model), Adapter(adapter), "nf4")
    for name in there.names():
        assert there.info(name).shape == then.info(name).shape
        assert torch.equal(there.read(name), then.read(name)), name
    merge(str(tmp_path / "nf4"), adapter, tmp_path / "out", plain=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.isfinite(load(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits).all()


def test_what_finetune_recorded_decides(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    some = ["model.layers.0.self_attn.q_proj"]
    record = {"base": {"bits": 4, "dtype": "float32", "double_quant": True, "nf4": some, "fingerprint": "another"}}
    (folder / "finetune.json").write_text(json.dumps(record))
    merged = Merged(FolderSource(tiny_model), Adapter(folder))
    assert [name for name, change in merged.changes.items() if change.rounded] == [f"{some[0]}.weight"]
    assert Merged(FolderSource(tiny_model), Adapter(folder), "base").fingerprint() != merged.fingerprint()
    notes = merge(str(tiny_model), folder, tmp_path / "out", plain=True).notes
    assert any("is a different checkpoint" in note for note in notes)


def test_plain_merge_in_stock_transformers(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    from peft import PeftModel

    report = merge(str(tiny_model), adapter, tmp_path / "out", plain=True)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(tiny_model), adapter)(ids).logits
        assert torch.allclose(load(tmp_path / "out")(ids).logits, expected, atol=1e-4)
        assert not torch.allclose(load(tiny_model)(ids).logits, expected, atol=1e-2)
    assert report.bits == 16 and len(report.left) == 21
    assert all(one.survived == pytest.approx(1, abs=1e-4) and (one.snr or 1e9) > 1e4 for one in report.left)
    again = merge(str(tiny_model), adapter, tmp_path / "out", plain=True)
    assert again.left == report.left


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantized_as_the_merged_checkpoint_would_be(
    tmp_path: Path, tiny_model: Path, adapter: Path, text_file: Path, method: str
) -> None:
    """Byte for byte what quantizing a merged checkpoint on disk gives, which was never written."""
    calibration = {"text": str(text_file), "samples": 4, "seqlen": 64}
    scheme = {"bits": 4, "group_size": 32}
    recipe = Recipe.from_dict({"methods": [method], "scheme": scheme, "calibration": calibration})
    merge(str(tiny_model), adapter, tmp_path / "whole", plain=True)
    llmq.quantize(str(tmp_path / "whole"), tmp_path / "expected", recipe)
    report = merge(str(tiny_model), adapter, tmp_path / "out", recipe)
    for file in sorted((tmp_path / "expected").glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    weights = [one.name for one in report.left]
    assert len(weights) == 21 and {w.removesuffix(".weight") for w in weights} == set(Adapter(adapter).factors)
    assert "merge.json" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_left_is_measured_on_the_written_weights(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    """Against the definition, from the model as stock transformers loads it; naive rounding by its definition."""
    report = merge(str(tiny_model), adapter, tmp_path / "out", RTN)
    merged, model = Merged(FolderSource(tiny_model), Adapter(adapter)), load(tmp_path / "out")
    with torch.no_grad():
        model(torch.tensor([[1]]))
    for one in report.left:
        exact, delta = (t.double() for t in merged.exact(one.name) if t is not None)
        error = model.get_parameter(one.name).double() - exact
        assert one.survived == pytest.approx(1 + float((error * delta).sum() / delta.square().sum()), abs=1e-4)
        assert one.snr == pytest.approx(float(delta.norm() / error.norm()), rel=1e-3)
        groups = exact.view(exact.shape[0], -1, 32)
        scale = groups.abs().amax(-1, keepdim=True) / 7.5  # the sixteenth level may go to either side
        naive = (groups / scale).round().clamp(-8, 7) * scale - groups
        assert one.naive_snr == pytest.approx(float(delta.norm() / naive.norm()), rel=0.15)
    assert report.worst[0].snr == min(one.snr or 1e9 for one in report.left)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["head"]}, "whole modules"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"target_parameters": ["experts.w"]}, "outside linear layers"),
    ],
)
def test_adapters_that_are_more_than_lora(tmp_path: Path, adapter: Path, change: dict[str, Any], words: str) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    refused(lambda: Adapter(folder), str(folder), words)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.2.", "layers.7."): value for name, value in tensors.items()}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_A" in name)
    return tensors | {name: torch.zeros(4, 96)}


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if "layers.1.mlp.down_proj.lora_B" not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "model.layers.7.mlp.down_proj, which this model does not have"),
        (widened, "model.layers.1.mlp.down_proj by [64, 96], and the weight is [64, 128]"),
        (halved, "model.layers.1.mlp.down_proj lacks A or B"),
    ],
)
def test_an_adapter_that_does_not_fit(
    tmp_path: Path,
    tiny_model: Path,
    adapter: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: str,
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, file)
    refused(lambda: merge(str(tiny_model), folder, tmp_path / "out", RTN), words)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_tied_weight(tmp_path: Path, turned_model: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", turned_model, target_modules=["lm_head"])
    refused(lambda: Merged(FolderSource(turned_model), Adapter(folder)), "lm_head", "is shared with another module")


def test_folders_that_are_no_adapter_or_not_ours(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    refused(lambda: merge(str(tiny_model), tiny_model, tmp_path / "out", RTN), "adapter_config.json")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(lambda: merge(str(tiny_model), pickled, tmp_path / "out", RTN), "adapter_model.safetensors", "pickles")
    refused(lambda: merge(str(tiny_model), adapter, adapter, RTN), "holds other files")
    refused(lambda: Merged(FolderSource(tiny_model), Adapter(adapter), "int4"), "--trained-on")


def test_another_adapter_does_not_go_on_in_its_folder(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    merge(str(tiny_model), adapter, tmp_path / "out", RTN)
    other = write_adapter(tmp_path / "other", tiny_model, lora_alpha=3)
    refused(lambda: merge(str(tiny_model), other, tmp_path / "out", RTN), "holds another run", "source")


def command(*args: object) -> Any:
    app = Typer()
    cli_adapters.add(app, cli.with_recipe, cli.explained)
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_commands(tmp_path: Path, tiny_model: Path) -> None:
    """A tune, its merge into 4 bits calibrated on its own rows, and into 16; options that do not go together."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": "abc" * 9}) + "\n" for i in range(20)))
    done = command("finetune", tiny_model, "--data", data, "-o", tmp_path / "tune", "--steps", 2, "--lr", 0.01)
    assert done.exit_code == 0 and "held-out loss" in done.stdout, done.output
    done = command("merge", tiny_model, tmp_path / "tune", "-o", tmp_path / "w4", "--group-size", 32)
    assert done.exit_code == 0 and "mean of 21 weights" in done.stdout, done.output
    assert str(data) in json.loads((tmp_path / "w4" / "merge.json").read_text())["calibration"]
    done = command("merge", tiny_model, tmp_path / "tune", "-o", tmp_path / "w16", "--bits", 16, "--loss")
    losses = json.loads((tmp_path / "w16" / "merge.json").read_text())["losses"]
    assert losses["merged"] == pytest.approx(losses["tuned"], rel=1e-4) and losses["tuned"] < losses["base"] - 0.1
    assert "100.0% of the tune's" in done.stdout, done.output
    assert done.exit_code == 0 and not (tmp_path / "w16" / "report.json").exists(), done.output
    done = command("merge", tiny_model, tmp_path / "tune", "-o", tmp_path / "no", "--bits", 16, "--method", "rtn")
    assert done.exit_code == 2 and "--method" in done.output
    data.unlink()
    done = command("merge", tiny_model, tmp_path / "tune", "-o", tmp_path / "no", "--loss")
    assert done.exit_code == 2 and "leave out --loss" in done.output
    done = command("merge", tiny_model, tmp_path / "none", "-o", tmp_path / "no")
    assert done.exit_code == 2 and "error:" in done.output


def test_interrupted_commands_say_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmq.adapters.finetune.finetune", interrupted)
    monkeypatch.setattr("llmq.adapters.merge.merge", interrupted)
    for words in (["finetune", tiny_model, "--data", "x.jsonl"], ["merge", tiny_model, adapter]):
        done = command(*words, "-o", tmp_path)
        assert done.exit_code == 130 and "the same command resumes" in " ".join(done.output.split())
