"""Every method to disk and back: stock transformers gives the logits of what llmq had in memory."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmq
from llmq import job
from llmq.block.attempt import Outcome
from llmq.block.block import Block
from llmq.grids.activations import round_input
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.plan import BlockPlan
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.streaming import stream
from llmq.watch import Silent
from tests.conftest import Run
from tests.llmq.blocks import apart, ids, write

IDS = torch.randint(10, 250, (2, 20), generator=torch.Generator().manual_seed(9))
W4 = Scheme(4, 32)
W8A8 = Scheme(8, None, activations=Activations())
STATIC = Scheme(8, None, activations=Activations(dynamic=False))


@dataclass
class Memory:
    """What llmq had in memory at the end of every block: parameters, and how each weight's input is rounded."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, tuple[Scheme, Tensor | None]] = field(default_factory=dict)

    @contextmanager
    def kept(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        original = stream.pack_weights

        def remember(plan: BlockPlan, block: Block) -> Any:
            prefix = plan.name
            for name in [*block.weights, *block.changed]:
                self.parameters[f"{prefix}.{name}"] = block.module.get_parameter(name).detach().float().clone()
            for name, work in block.weights.items():
                self.activations[f"{prefix}.{name.removesuffix('.weight')}"] = work.scheme, work.input_scale
            return original(plan, block)

        with monkeypatch.context() as patch:
            patch.setattr(stream, "pack_weights", remember)
            yield

    def model(self, source: Path) -> PreTrainedModel:
        """The source with these parameters, rounding its activations itself."""
        model = loaded(source)
        with torch.no_grad():
            for name, value in self.parameters.items():
                model.get_parameter(name).copy_(value)
        for name, (scheme, scale) in self.activations.items():
            if scheme.activations is not None:
                self._round(model.get_submodule(name), scheme, scale)
        return model

    def _round(self, module: nn.Module, scheme: Scheme, scale: Tensor | None) -> None:
        assert scheme.activations is not None and scheme.activations.dynamic == (scale is None)

        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (round_input(args[0], scheme, scale),)

        module.register_forward_pre_hook(hook)


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits
    return found


def quantized(
    source: Path, out: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, windows: Tensor | None = None
) -> tuple[Report, Memory]:
    memory = Memory()
    with memory.kept(monkeypatch):
        report = job.quantize(str(source), out, recipe, ids=ids() if windows is None else windows)
    return report, memory


def recipe(method: str, scheme: Scheme, **options: Any) -> Recipe:
    return Recipe(methods=tuple(method.split("+")), scheme=scheme, options=options)


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one channel in sixteen far larger than the others, as norms of large models make them."""
    folder = write("llama", tmp_path_factory.mktemp("models") / "outlying")
    model = loaded(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.abs_().add_(0.5)[3::16] *= 20
    model.save_pretrained(folder)
    return folder


RECIPES = [
    recipe("awq", W4),
    recipe("awq", Scheme(3, 32, symmetric=False)),
    recipe("awq+gptq", W4, correct="none"),
    recipe("hqq", W4),
    recipe("hqq", Scheme(4, 32, symmetric=False)),
    recipe("rtn", Scheme(4, 32, symmetric=False)),
    recipe("smoothquant", W8A8),
    recipe("smoothquant+gptq", STATIC, alpha=0.5),
    recipe("outlier_suppression", STATIC),
    recipe("outlier_suppression_plus", W8A8),
    recipe("rtn", Scheme(8, None, grid="fp8", activations=Activations())),
    recipe("rtn", Scheme(4, 32, activations=Activations(grid="fp8"))),
    recipe("smoothquant", Scheme(8, None, grid="fp8", activations=Activations(dynamic=False))),
]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", RECIPES, ids=lambda r: f"{'+'.join(r.methods)} {r.scheme}")
def test_stock_transformers_gives_the_logits_in_memory(
    chosen: Recipe, outlying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, memory = quantized(outlying, tmp_path / "out", chosen, monkeypatch)
    target, before = logits(memory.model(outlying)), logits(loaded(outlying))
    assert apart([target], [before]) > 1e-3
    # 8-bit inputs: a value between two codes may fall on either side after sums in another order.
    tolerance = 1e-4 if chosen.scheme.activations is None else 5e-3
    assert apart([logits(loaded(tmp_path / "out"))], [target]) < tolerance
    tried = [line for block in report.blocks for line in block.log]
    if chosen.methods[0] in ("hqq", "rtn"):
        assert not tried
    else:
        assert any(line.outcome is Outcome.KEPT for line in tried)
        # What awq keeps has less error, which on random weights is chance: it may leave all norms alone.
        assert any("layernorm" in name for name in memory.parameters) or chosen.methods[0] == "awq"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "gemma2", "phi3"])
@pytest.mark.parametrize("method", ["outlier_suppression_plus", "awq"])
def test_shifts_and_other_norms(kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(kind, tmp_path / "model")
    # compressed-tensors takes one scale for all tokens where a module is fed two axes, as opt's are: static ones there.
    scheme = W4 if method == "awq" else STATIC if kind == "opt" else W8A8
    _, memory = quantized(source, tmp_path / "out", recipe(method, scheme), monkeypatch)
    target = logits(memory.model(source))
    assert apart([logits(loaded(tmp_path / "out"))], [target]) < (1e-4 if method == "awq" else 1e-2)


@pytest.mark.slow
def test_a_transform_of_the_demo_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a trained model with outliers planted in its norms, SmoothQuant and Outlier Suppression lose less than RTN."""
    from llmq.demo import path

    source = tmp_path / "planted"
    model = loaded(path())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:  # the function stays: the matrices that follow are divided
                parameter[3::32] *= 30
                layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
                inner = layer.self_attn if "input" in name else layer.mlp
                for part in ("q_proj", "k_proj", "v_proj") if "input" in name else ("gate_proj", "up_proj"):
                    inner.get_submodule(part).weight[:, 3::32] /= 30
    model.save_pretrained(source)
    reference, lost = logits(loaded(path())), {}
    assert apart([logits(model)], [reference]) < 1e-4
    for method in ("rtn", "smoothquant", "outlier_suppression"):
        chosen = recipe(method, STATIC)
        _, memory = quantized(source, tmp_path / method, chosen, monkeypatch, ids(4, 64))
        lost[method] = apart([logits(loaded(tmp_path / method))], [reference])
        assert apart([logits(loaded(tmp_path / method))], [logits(memory.model(source))]) < 5e-3
    assert lost["smoothquant"] < 0.6 * lost["rtn"]
    assert lost["outlier_suppression"] < 0.6 * lost["rtn"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), [("gptq", Scheme(2, 64)), ("rtn", Scheme(3, 64))])
def test_corrections_of_the_demo_pay(method: str, scheme: Scheme, tmp_path: Path) -> None:
    """On a trained model and text that no correction was made from, in stock transformers."""
    from llmq.demo import calibration_text, evaluation_text, path

    tokenizer = AutoTokenizer.from_pretrained(path())
    given, held = (
        torch.tensor(tokenizer(text[:40_000])["input_ids"][: 24 * 128]).view(24, 128)
        for text in (calibration_text(), evaluation_text())
    )
    lost = {}
    with torch.no_grad():
        wanted = loaded(path())(held).logits.log_softmax(-1)
        for how in ("none", "held-out"):
            out = tmp_path / how
            report = llmq.quantize(path(), out, recipe(method, scheme, correct=how), ids=given)
            found = loaded(out)(held).logits.log_softmax(-1)
            lost[how] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert lost["held-out"] < 0.9 * lost["none"]
    rows = report.quantized
    assert all(row.correction is not None for row in rows)
    # Two of seven weights add to the residual stream: the last of attention and that of the MLP.
    assert sum(row.correction[1] is not None for row in rows) == 2 * len(report.blocks)
    assert "8 also for those in the residual stream" in str(report.corrections)
    assert Report.load(out).quantized == rows


@pytest.mark.slow
def test_presets_through_the_command_line(
    tiny_model: Path, text_file: Path, tmp_path: Path, llmq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for preset in ("fp8", "fast-4", "w4a16-awq", "w8a8-smoothquant"):
        memory, out = Memory(), tmp_path / preset
        group = () if preset in ("fp8", "w8a8-smoothquant") else ("--group-size", "32")
        short = ("--calib", text_file, "--samples", 2, "--seqlen", 48)
        with memory.kept(monkeypatch):
            done = llmq("quantize", tiny_model, "-o", out, "--recipe", preset, *group, *short)
        assert done.returncode == 0, done.stderr
        assert apart([logits(loaded(out))], [logits(memory.model(tiny_model))]) < 5e-3
        assert "stock transformers with compressed-tensors reads it" in " ".join(done.stdout.split())


def test_the_nf4_preset(tiny_model: Path, tmp_path: Path, llmq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    memory = Memory()
    with memory.kept(monkeypatch):
        done = llmq("quantize", tiny_model, "-o", tmp_path / "out", "--recipe", "nf4")
    assert done.returncode == 0, done.stderr
    # Training mode is the reader's exact path: in evaluation it multiplies in bfloat16.
    assert apart([logits(loaded(tmp_path / "out").train())], [logits(memory.model(tiny_model))]) < 1e-5
    assert "bitsandbytes" in " ".join(done.stdout.split())


def test_asymmetric_weights_load_by_plain_from_pretrained(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dtype, no argument: what a model card tells people to do."""
    chosen = recipe("gptq", Scheme(4, 32, symmetric=False))
    report, memory = quantized(tiny_model, tmp_path / "out", chosen, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert apart([logits(model)], [logits(memory.model(tiny_model))]) < 1e-4
    assert any("asymmetric" in loader and "memory" in loader for loader in report.loaders)


class Stopping(Silent):
    """A watch that presses Ctrl-C after some blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.name = blocks, ""

    def stage(self, name: str, total: int) -> None:
        self.name = name

    def step(self, text: str) -> None:
        self.blocks -= self.name == "Quantizing"
        if self.blocks == 0 and self.name == "Quantizing":
            raise KeyboardInterrupt


def digests(folder: Path) -> dict[str, str]:
    """Everything but what tells times."""
    files = (p for p in folder.iterdir() if p.is_file() and p.name not in ("report.json", "report.html", "README.md"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def log(report: Report) -> list[Any]:
    """What was tried in each block."""
    return [(block.name, block.error, block.log) for block in report.blocks]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "stop"),
    [
        *((recipe("awq+gptq", W4), stop) for stop in (1, 2, 3)),
        *((recipe("smoothquant", STATIC), stop) for stop in (1, 3)),
        (recipe("outlier_suppression", STATIC), 2),
    ],
)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    chosen: Recipe, stop: int, outlying: Path, tmp_path: Path, whole: dict[str, Path]
) -> None:
    name = "+".join(chosen.methods)
    if name not in whole:
        whole[name] = tmp_path / "whole"
        llmq.quantize(str(outlying), whole[name], copy.deepcopy(chosen), ids=ids())
    with pytest.raises(KeyboardInterrupt):
        job.quantize(str(outlying), tmp_path / "broken", chosen, ids=ids(), watch=Stopping(stop))
    assert not (tmp_path / "broken" / "config.json").exists()
    report = job.quantize(str(outlying), tmp_path / "broken", chosen, ids=ids())
    assert digests(tmp_path / "broken") == digests(whole[name])
    assert log(report) == log(Report.load(whole[name]))


@pytest.fixture(scope="module")
def whole() -> dict[str, Path]:
    """Unbroken runs, by method."""
    return {}


PLACES = {("smoothquant", False), ("SmoothQuant", True)}


def test_the_report_says_what_was_tried(
    outlying: Path, tmp_path: Path, llmq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import write_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * 90)
    write_tokenizer(outlying)
    out = tmp_path / "out"
    short = ("--calib", text, "--samples", 3, "--seqlen", 48)
    done = llmq("quantize", outlying, "-o", out, "--method", "smoothquant", "--alpha", 0.9, *short)
    assert done.returncode == 0, done.stderr
    written = json.loads((out / "report.json").read_text())
    tried = [line for block in written["blocks"] for line in block["log"]]
    kept = [line for line in tried if line["outcome"] == "kept"]
    assert kept and len(kept) < len(tried)
    for line in tried:
        assert line["before"] > 0 and (line["method"], line["where"] is None) in PLACES
        assert line["after"] is None or (line["outcome"] == "kept") == (line["after"] < line["before"])
        assert line["after"] is not None or "no scale tried" in line["why"]
    said = " ".join(done.stdout.split())
    assert f"tried {len(tried)} changes to the blocks, kept {len(kept)}, undid {len(tried) - len(kept)}" in said
    assert "undone in model.layers." in said and "loads: stock transformers" in said and "vLLM" in said
    assert written["format"] == "compressed-tensors int-quantized" and len(written["loaders"]) == 2
    assert len(Report.load(out).attempts(Outcome.UNDONE)) == len(tried) - len(kept)
    assert written["recipe"]["options"] == {"alpha": 0.9}
