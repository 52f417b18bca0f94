"""Models that generate no text, or have an encoder: opened by a class that is named, quantized without calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llmq as package
from llmq import formats, job
from llmq.checkpoint.source import FolderSource
from llmq.discovery.names import link
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from tests.conftest import Run, write_tokenizer
from tests.llmq.blocks import apart
from tests.llmq.classes import KINDS, outputs, write


def recipe(kind: str, **more: Any) -> Recipe:
    return Recipe(**{"methods": ("rtn",), "scheme": Scheme(4, 32), "model_class": KINDS[kind].opener} | more)


def twin(kind: str, source: Path, report: Report, folder: Path) -> Any:
    """The unquantized model with the folder's dequantized weights."""
    model = getattr(transformers, KINDS[kind].opener).from_pretrained(source, dtype=torch.float32).eval()
    written = FolderSource(folder, quantized_ok=True)
    places = link(model, {f"{row.name}.weight": row.shape for row in report.quantized}).source
    for row in report.quantized:
        suffixes = formats.of(row.scheme).spec(row.shape, row.scheme, torch.float32)
        stored = {suffix: written.read(f"{row.name}.{suffix}") for suffix in suffixes}
        (place, *_) = [parameter for parameter, tensor in places.items() if tensor == f"{row.name}.weight"]
        value = formats.of(row.scheme).unpack(stored, row.scheme).dequantize(torch.float32)
        model.get_parameter(place).data = value
    return model


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of two models' outputs."""
    assert len(found) == len(wanted) > 0
    return max(apart(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dinov2"])
def test_stock_and_llmq_open_it_with_the_dequantized_weights(kind: str, tmp_path: Path) -> None:
    source, out = write(kind, tmp_path / "m"), tmp_path / "q"
    report = job.quantize(str(source), out, recipe(kind, methods=("hqq",)))
    assert len(report.quantized) >= 8 and not report.blocks and report.bits_per_weight < 5.2
    opener = getattr(transformers, KINDS[kind].opener)
    model, told = opener.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]
    same, inputs = twin(kind, source, report, out), KINDS[kind].inputs()
    wanted = outputs(same, inputs)
    dense = opener.from_pretrained(source, dtype=torch.float32).eval()
    assert far(outputs(model.eval(), inputs), wanted) == 0 and far(outputs(dense, inputs), wanted) > 1e-3
    ours = package.load(out, device_map="cpu", dtype="float32")
    assert type(ours) is type(same) and far(outputs(ours, inputs), wanted) < 1e-5
    if "decoder_input_ids" in inputs:
        # The encoder alone runs first.
        asked = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        answers = [m.generate(**asked, max_new_tokens=5, do_sample=False) for m in (model, same, ours)]
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "t5", "siglip", "dinov2"])
def test_nf4_by_bitsandbytes(kind: str, tmp_path: Path) -> None:
    """Types whose initialization reads weights too: bitsandbytes' modules have some."""
    source, out = write(kind, tmp_path / "m"), tmp_path / "q"
    report = job.quantize(str(source), out, recipe(kind, methods=("nf4",), scheme=Scheme(4, 64, grid="nf4")))
    opener, inputs = getattr(transformers, KINDS[kind].opener), KINDS[kind].inputs()
    model, told = opener.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]
    # bitsandbytes multiplies in lower precision on some processors.
    assert far(outputs(model.eval(), inputs), outputs(twin(kind, source, report, out), inputs)) < 0.05


@pytest.mark.slow
def test_rounded_inputs_and_fp8(tmp_path: Path) -> None:
    source = write("bert", tmp_path / "m")
    schemes = {
        "fp8": (Scheme(8, None, grid="fp8"), 0.0),
        "fp8-dynamic": (Scheme(8, None, grid="fp8", activations=Activations()), 0.1),
        "w8a8": (Scheme(8, None, activations=Activations()), 0.05),
        "asymmetric": (Scheme(4, 32, False), 0.0),
    }
    inputs = KINDS["bert"].inputs()
    for name, (scheme, limit) in schemes.items():
        out = tmp_path / name
        report = job.quantize(str(source), out, recipe("bert", scheme=scheme))
        model: Any = transformers.BertModel.from_pretrained(out, dtype=torch.float32)
        found = far(outputs(model.eval(), inputs), outputs(twin("bert", source, report, out), inputs))
        assert found <= limit and (limit == 0 or found > 0), name


def test_the_command_line(tmp_path: Path, llmq: Run) -> None:
    source, out = write("bert", tmp_path / "m"), tmp_path / "q"
    refused = llmq("quantize", source, "-o", out, "--method", "rtn")
    assert refused.returncode == 2 and "--class AutoModel --method rtn" in refused.stderr.replace("\n", " ")
    given = ("--class", "AutoModel", "--group-size", 32)
    refused = llmq("quantize", source, "-o", out, *given)
    assert refused.returncode == 2 and "'gptq' is calibrated" in refused.stderr
    done = llmq("quantize", source, "-o", out, *given, "--method", "hqq", "--keep", "pooler")
    assert done.returncode == 0, done.stderr
    assert "12 weights of BertModel" in done.stdout and "kept (kept by --keep): pooler.dense" in done.stdout
    assert "model_class: AutoModel" in (out / "report.html").read_text()
    told = llmq("eval", out)
    assert told.returncode == 2 and "was quantized as AutoModel (--class)" in told.stderr.replace("\n", " ")
    assert llmq("inspect", out).returncode == 0


def test_a_folder_that_does_not_say_its_class_is_written_with_it(tmp_path: Path) -> None:
    source, out = write("bert", tmp_path / "m"), tmp_path / "q"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    job.quantize(str(source), out, recipe("bert", methods=("rtn",), model_class="BertModel"))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertModel"]
    assert type(package.load(out, device_map="cpu")) is transformers.BertModel


@pytest.mark.slow
def test_a_broken_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmq.checkpoint.sink import Sink
    from llmq.streaming import block_io

    source = write("bart", tmp_path / "m")
    monkeypatch.setattr(block_io, "REST_BYTES", 100_000)
    job.quantize(str(source), tmp_path / "whole", recipe("bart"))
    real = Sink.commit
    left = [3]

    def breaks(sink: Sink, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(sink, *args)

    with monkeypatch.context() as within, pytest.raises(KeyboardInterrupt):
        within.setattr(Sink, "commit", breaks)
        job.quantize(str(source), tmp_path / "broken", recipe("bart"))
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*.safetensors")}
    assert len(written) == 3
    report = job.quantize(str(source), tmp_path / "broken", recipe("bart"))
    assert len(report.quantized) == 32
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes()
    assert all((tmp_path / "broken" / name).stat().st_mtime_ns == at for name, at in written.items())
    assert (tmp_path / "whole" / "config.json").read_bytes() == (tmp_path / "broken" / "config.json").read_bytes()


def test_the_parts_of_a_sentence_model_go_along(tmp_path: Path) -> None:
    """As sentence-transformers writes them; 6.2.0 gave the same embeddings up to the rounding, by hand."""
    source = write("bert", tmp_path / "m")
    write_tokenizer(source)
    parts = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    (source / "modules.json").write_text(json.dumps(parts))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 64}')
    job.quantize(str(source), tmp_path / "q", recipe("bert"))
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (source / name).read_bytes()
