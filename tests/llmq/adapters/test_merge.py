"""Merging: in stock transformers, as any source of the quantize job; what is left of a tune; the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
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
from llmq.formats.dequantized import Dequantized, open_source
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.llmq.adapters.made import (
    apart,
    halved,
    load,
    nf4,
    opened,
    peft_merged,
    renamed,
    trained,
    widened,
    write_adapter,
)
from tests.llmq.formats import published
from tests.llmq.refusal import refused

PUBLISHED = {
    "fp8": published.fp8,
    "modelopt": lambda folder: published.modelopt(folder, beside=True),
    "modelopt NVFP4": published.modelopt_nvfp4,
    "mxfp4": published.in_layout("mxfp4-pack-quantized"),
}
RTN = Recipe(methods=("rtn",), scheme=Scheme(4, 32))


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


@pytest.mark.slow
@pytest.mark.parametrize("write", PUBLISHED)
def test_a_base_published_in_few_bits(tmp_path: Path, tiny_model: Path, adapter: Path, write: str) -> None:
    """The adapter's change is added to the dequantized values, as PEFT adds it to the dense twin."""
    folder = PUBLISHED[write](shutil.copytree(tiny_model, tmp_path / "few"))
    source = open_source(folder)
    assert isinstance(source, Dequantized) and len(source.coded) == 21
    twin = shutil.copytree(tiny_model, tmp_path / "twin")
    (twin / "config.json").write_text(json.dumps(source.config))
    save_file({name: source.read(name) for name in source.names()}, twin / "model.safetensors", {"format": "pt"})
    report = merge(str(folder), adapter, tmp_path / "plain", plain=True)
    assert len(report.left) == 21 and min(one.survived for one in report.left) > 0.95
    written = dict(opened(tmp_path / "plain").state_dict())
    expected = peft_merged(twin, adapter)
    # Both round the same sums to bfloat16, PEFT after another rounding of the change.
    assert apart(written, expected) <= 2**-7 < apart(written, dict(opened(twin).state_dict()))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and not (tmp_path / "plain" / "hf_quant_config.json").exists()
    for name, base in (("few", folder), ("twin", twin)):
        merge(str(base), adapter, tmp_path / f"{name}-w4", RTN)
    few, dense = (load_file(next((tmp_path / f"{name}-w4").glob("*.safetensors"))) for name in ("few", "twin"))
    assert few.keys() == dense.keys() and all(torch.equal(few[name], dense[name]) for name in few)


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


@pytest.mark.parametrize("base", ["qwen3_5", "gemma3", "gpt2"])
def test_a_tune_of_ours_is_merged_as_peft_merges_it(tmp_path: Path, bases: dict[str, Path], base: str) -> None:
    """Of checkpoints whose causal class is the text half, or all, or keeps weights as [in, out]."""
    from llmq.adapters.finetune import finetune
    from llmq.adapters.settings import Settings
    from tests.conftest import write_tokenizer

    folder = shutil.copytree(bases[base], tmp_path / base)
    write_tokenizer(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": "abc" * 5}) + "\n" for i in range(12)))
    finetune(str(folder), rows, tmp_path / "tune", Settings(base_bits=16, steps=2, lr=0.02, rank=4, optimizer="torch"))
    merge(str(folder), tmp_path / "tune", tmp_path / "out", plain=True)
    written = dict(opened(tmp_path / "out").state_dict())
    assert apart(written, peft_merged(folder, tmp_path / "tune")) <= 1e-3
    assert apart(written, dict(opened(folder).state_dict())) > 1e-2


@pytest.mark.slow
def test_a_norm_and_the_rows_of_an_embedding_are_measured(tmp_path: Path, tiny_model: Path, text_file: Path) -> None:
    """What is not quantized is written as merged; a method that moves scales leaves norms out of the measure."""
    options = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "trainable_token_indices": [3]}
    folder = trained(tmp_path / "adapter", tiny_model, **options)
    report = merge(str(tiny_model), folder, tmp_path / "out", RTN)
    left = {one.name: one for one in report.left}
    assert len(left) == 3 + 7 + 1 and left["model.norm.weight"].survived == pytest.approx(1, abs=1e-3)
    assert left["model.embed_tokens.weight"].naive_snr is None and left["model.embed_tokens.weight"].change > 0
    assert left["model.layers.0.self_attn.q_proj.weight"].naive_snr is not None
    calibration = {"text": str(text_file), "samples": 2, "seqlen": 32}
    scheme = {"bits": 4, "group_size": 32}
    recipe = Recipe.from_dict({"methods": ["awq", "rtn"], "scheme": scheme, "calibration": calibration})
    moved = merge(str(tiny_model), folder, tmp_path / "moved", recipe)
    assert {one.name for one in moved.left} == {name for name in left if "norm" not in name}


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
    data = tmp_path / "rows.JSONL"
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
