"""The stage of distillation: what is trained and written, what is left alone, and what a killed run resumes to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmq
from llmq import job
from llmq.checkpoint.sink import Sink
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.distill import Distill
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from tests.architectures import tiny
from tests.conftest import write_tiny_model
from tests.end_to_end.test_resume import digests
from tests.llmq import mixtures
from tests.llmq.refusal import refused
from tests.stages import AtStep

IDS = torch.randint(256, (12, 32), generator=torch.Generator().manual_seed(0))
OPTIONS = {"steps": 12, "learning_rate": 0.02, "minibatch": 2}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.planning.types.BATCH_TOKENS", 64)


def recipe(scheme: Scheme, methods: str = "rtn+distill", **options: Any) -> Recipe:
    return Recipe(methods=tuple(methods.split("+")), scheme=scheme, options=OPTIONS | options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def logits(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(rows).logits
    return found


SCHEMES = {
    "int2": Scheme(2, 32),
    "int3 asymmetric": Scheme(3, 32, False),
    "fp8": Scheme(8, None, grid="fp8"),
    "w8a8": Scheme(8, None, activations=Activations()),
    "w8a8 static": Scheme(8, None, activations=Activations(dynamic=False)),
    "nf4": Scheme(4, 64, grid="nf4"),
}


@pytest.mark.parametrize(
    "kind", ["int2", pytest.param("w8a8", marks=pytest.mark.slow), "nf4", "fp8", "int3 asymmetric"]
)
def test_scales_and_norms_move_and_nothing_else(kind: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", dtype="bfloat16")
    plain = recipe(SCHEMES[kind], "rtn", range="minmax")
    llmq.quantize(str(model), tmp_path / "plain", Recipe(("rtn",), plain.scheme, options={"range": "minmax"}), ids=IDS)
    report = llmq.quantize(str(model), tmp_path / "out", recipe(plain.scheme, range="minmax"), ids=IDS)
    assert report.tuned is not None and Report.load(tmp_path / "out") == report
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if raw(before[name]) != raw(after[name])}
    assert {after[name].dtype for name in after} == {before[name].dtype for name in before}
    if report.tuned.kept:
        assert report.tuned.after < report.tuned.before
        assert all(name.endswith(("scale", "norm.weight", "absmax")) or "layernorm" in name for name in changed)
        assert "model.norm.weight" in changed and any("scale" in n or "absmax" in n for n in changed)
    else:
        assert not changed
    assert not (tmp_path / "out" / ".llmq" / "distilled").exists()


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_loss_is_that_of_the_written_folder_in_stock_transformers(kind: str, tmp_path: Path) -> None:
    """On the windows that were held out, by logits; gemma2 has tied embeddings and a soft limit on logits."""
    model = tiny.make(kind, tmp_path / "model")
    made = recipe(SCHEMES["int2"])
    report = llmq.quantize(str(model), tmp_path / "out", made, ids=IDS)
    assert report.tuned is not None and report.tuned.kept
    held, train = Distill().split(6)
    assert sorted(held + train) == [*range(6)] and len(held) == 1
    rows = IDS[2 * held[0] : 2 * held[0] + 2]
    want, have = (logits(folder, rows).log_softmax(-1) for folder in (model, tmp_path / "out"))
    divergence = (want.exp() * (want - have)).sum(-1).mean()
    assert float(divergence) == pytest.approx(report.tuned.after, rel=2e-3)


class Stopping(AtStep):
    """Raises, as if the run were killed."""

    def reached(self) -> None:
        raise KeyboardInterrupt

    def note(self, text: str) -> None:
        raise AssertionError(text)


STOPS = [
    ("Quantizing", 2),
    ("Running the unquantized model", 1),
    ("Distilling", 1),
    ("Distilling", 10),
    ("Distilling", 11),
]
STOPS += [("Distilling", 12), *(("Writing scales", at) for at in (1, 2, 3, 4)), ("Verifying", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("methods", ["rtn+distill", "signround+distill"])
def test_broken_anywhere_it_ends_in_the_same_bytes(methods: str, tmp_path: Path) -> None:
    """One run is broken at every place, one after the other; the second method knows the unquantized states."""
    model = str(write_tiny_model(tmp_path / "model", layers=3))
    made = recipe(SCHEMES["int2"], methods, **({"iterations": 3} if "sign" in methods else {}))
    whole = llmq.quantize(model, tmp_path / "whole", made, ids=IDS)
    assert whole.tuned is not None and whole.tuned.kept
    for stage, at in STOPS:
        if stage.startswith("Running") and "sign" in methods:
            continue
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(model, tmp_path / "broken", made, ids=IDS, watch=Stopping(stage, at))
    report = llmq.quantize(model, tmp_path / "broken", made, ids=IDS)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")
    assert report.tuned is not None
    assert (report.tuned.before, report.tuned.after) == (whole.tuned.before, whole.tuned.after)


def test_nothing_is_changed_if_nothing_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 bits and steps that destroy the model, the written folder is the one without this method."""
    model = str(write_tiny_model(tmp_path / "model"))
    monkeypatch.setattr(Distill, "rate", lambda self, step: 0.9)
    report = llmq.quantize(model, tmp_path / "out", recipe(Scheme(8, 32)), ids=IDS)
    assert report.tuned is not None and not report.tuned.kept and report.tuned.after == report.tuned.before
    assert "nothing was changed" in str(report.tuned)
    for name in ("README.md", "report.html"):
        assert "nothing was changed" in (tmp_path / "out" / name).read_text()
    plain = Recipe(methods=("rtn",), scheme=Scheme(8, 32))
    llmq.quantize(model, tmp_path / "plain", plain, ids=IDS)
    shards = {name: digest for name, digest in digests(tmp_path / "out").items() if "safetensors" in name}
    assert shards == {name: digest for name, digest in digests(tmp_path / "plain").items() if "safetensors" in name}


def test_what_was_trained_is_missing_while_it_is_written(tmp_path: Path) -> None:
    model, out = str(write_tiny_model(tmp_path / "model")), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(model, out, recipe(SCHEMES["int2"]), ids=IDS, watch=Stopping("Writing scales", 2))
    shutil.rmtree(out / ".llmq" / "distilled")
    refused(lambda: llmq.quantize(model, out, recipe(SCHEMES["int2"]), ids=IDS), "distilled", f"delete {out}")


@pytest.mark.slow
def test_a_state_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    """A shard was damaged, so that its block, and all after it, are quantized and trained again."""
    model, out = str(write_tiny_model(tmp_path / "model")), tmp_path / "out"
    llmq.quantize(model, tmp_path / "whole", recipe(SCHEMES["int2"]), ids=IDS)
    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(model, out, recipe(SCHEMES["int2"]), ids=IDS, watch=Stopping("Writing scales", 3))
    sorted(out.glob("model-*"))[1].write_bytes(b"x")
    llmq.quantize(model, out, recipe(SCHEMES["int2"]), ids=IDS)
    assert digests(out) == digests(tmp_path / "whole")


def test_written_blocks_that_differ_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are those of the distilled model: a shard with the old scales would be noticed."""
    model, out = str(write_tiny_model(tmp_path / "model")), tmp_path / "out"
    real = Sink.replace

    def old(sink: Sink, unit: str, tensors: dict[str, torch.Tensor], payload: dict[str, Any]) -> None:
        real(sink, unit, sink.read_unit(unit) if unit == "block 1" else tensors, payload)

    monkeypatch.setattr(Sink, "replace", old)
    refused(lambda: llmq.quantize(model, out, recipe(SCHEMES["int2"]), ids=IDS), "layers.1", "read back")


def test_what_cannot_be_trained_is_refused_by_the_plan(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model"))
    double = Scheme(4, 64, grid="nf4", double_quant=True)
    refused(lambda: job.plan(model, recipe(double), ids=IDS), "nf4", "cannot move", "leave distill out")
    refused(
        lambda: job.plan(model, recipe(SCHEMES["int2"]), ids=IDS[:2]), "2 windows are one batch", "at least 3 --samples"
    )
    experts = str(mixtures.write("qwen3_moe", tmp_path / "mixture"))
    refused(lambda: job.plan(experts, recipe(Scheme(4, 32)), ids=IDS), "routed experts of", "leave distill out")
    refused(
        lambda: job.plan(model, recipe(SCHEMES["int2"], "distill+gptq"), ids=IDS), "last what tunes", "'gptq+distill'"
    )
    named = Recipe(methods=("rtn", "distill"), model_class="AutoModelForCausalLM")
    refused(lambda: job.plan(model, named, ids=IDS), "calibrat", "rtn")
    refused(lambda: job.plan(model, recipe(SCHEMES["int2"], steps=0), ids=IDS), "steps")
    refused(lambda: job.plan(model, recipe(SCHEMES["int2"], learning_rate=1.0), ids=IDS), "learning-rate")
