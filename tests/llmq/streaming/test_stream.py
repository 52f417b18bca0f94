"""The loop: what is verified after writing, what is refused on the way, what is kept of a tied head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import llmq
from llmq import job
from llmq.block.block import Block, WeightState
from llmq.discovery.calls import States
from llmq.discovery.matmuls import flat
from llmq.discovery.tail import Tail
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.machine import device_memory
from llmq.methods import Pipeline
from llmq.planning.plan import BlockPlan, Plan
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.streaming import steps, stream
from llmq.streaming.block_io import BlockIO
from llmq.streaming.stream import check_signature, output_signature
from tests.architectures import tiny
from tests.conftest import write_tiny_model
from tests.llmq import mixtures
from tests.llmq.refusal import refused

IDS = torch.randint(256, (3, 64), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(scheme=Scheme(4, 32))


def test_a_weight_read_back_wrong_is_noticed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BlockIO.restore

    def wrong(io: BlockIO, block: BlockPlan) -> list[WeightState]:
        states = real(io, block)
        if block.index == 2:
            block.module.get_parameter("mlp.down_proj.weight").data[1:] = 0
        return states

    monkeypatch.setattr(BlockIO, "restore", wrong)
    refused(lambda: llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, ids=IDS), "layers.2", "read back")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_weight_outside_the_blocks_read_back_wrong_is_noticed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockIO, "read_back", lambda io, weight: torch.zeros(weight.shape))
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 32), include=("lm_head",))
    refused(lambda: llmq.quantize(str(tiny_model), tmp_path / "out", recipe, ids=IDS), "lm_head.weight", "read back")
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    # The written weight is as it should be: only reading it back was not.
    assert len(llmq.quantize(str(tiny_model), tmp_path / "out", recipe, ids=IDS).quantized) == 22


def test_an_output_that_overflows_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps.quantize
    seen = []

    def huge(block: Block, pipeline: Pipeline) -> None:
        real(block, pipeline)
        seen.append(block)
        if len(seen) == 2:
            block.module.get_parameter("mlp.up_proj.weight").data.fill_(float("inf"))
            block.replays = None  # What was computed before does not have it.

    monkeypatch.setattr(steps, "quantize", huge)
    refused(lambda: llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, ids=IDS), "layers.1", "after quantization")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_source_dtype(dtype: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", dtype=dtype, shard="100KB")
    report = llmq.quantize(str(model), tmp_path / "out", RECIPE, ids=IDS)
    assert len(report.weights) == 23 and not report.fallbacks
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with safe_open(tmp_path / "out" / index[name], "pt") as shard:
        assert shard.get_tensor(name).dtype == getattr(torch, dtype)


def test_everything_is_in_the_report(tiny_model: Path, tmp_path: Path) -> None:
    report = llmq.quantize(str(tiny_model), tmp_path / "out", RECIPE, ids=IDS)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["name"] for row in written["weights"]} == {row.name for row in report.weights}
    for row in written["weights"]:
        assert row["reason"]["sentence"] if "reason" in row else 0 < row["error"] < 0.3
    assert Report.load(tmp_path / "out") == report
    assert all(0 < block["error"] < 0.5 for block in written["blocks"])
    assert written["peak_memory"] > 0 and written["bits_per_weight"] == pytest.approx(report.bits_per_weight)


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted anew from call to call; a host has none."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append("most") or 1 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    assert device_memory(torch.device("cpu")) is None and not asked
    assert device_memory(torch.device("cuda:0")) == 1 << 30 and asked == ["most", "reset"]


def zeroed(folder: Path, *endings: str) -> Path:
    """A tiny model in which the tensors whose names end so are all zeros."""
    model = write_tiny_model(folder, layers=2)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 0 if n.endswith(endings) else t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    return model


SCHEMES = {
    "int4": Scheme(4, 32),
    "int3 asymmetric": Scheme(3, 32, symmetric=False),
    "nf4": Scheme(4, 64, grid="nf4"),
    "fp8": Scheme(8, None, grid="fp8"),
}


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in which all is zero; do not change it."""
    return zeroed(tmp_path_factory.mktemp("models") / "zeros", "")


METHODS = ("rtn", "gptq", "hqq", "awq+gptq", "signround")


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        pytest.param(method, scheme, marks=[] if method == "rtn" or scheme == "int4" else [pytest.mark.slow])
        for method in METHODS
        for scheme in SCHEMES
    ],
)
def test_an_output_of_zeros_is_no_damage(tmp_path: Path, zeros: Path, method: str, scheme: str) -> None:
    """All weights are zero: so is every block's output, and nothing is relative to it."""
    options = {"iterations": 2} if method == "signround" else {}
    recipe = Recipe(methods=tuple(method.split("+")), scheme=SCHEMES[scheme], options=options)
    report = llmq.quantize(str(zeros), tmp_path / "out", recipe, ids=IDS)
    assert all(block.zero and block.error == 0 and block.shown == "output is zero" for block in report.blocks)
    assert all(row.error == 0 for row in report.quantized)
    assert any("layers.0" in w and "is zero for every calibration window" in w for w in report.warnings)
    assert Report.load(tmp_path / "out") == report


@pytest.mark.parametrize(
    ("endings", "zero"),
    [
        (("embed_tokens.weight",), True),
        (("1.self_attn.o_proj.weight", "1.mlp.down_proj.weight"), False),  # a block that adds nothing
        (("0.mlp.up_proj.weight",), False),
    ],
)
def test_zeros_in_some_places(tmp_path: Path, endings: tuple[str, ...], zero: bool) -> None:
    report = llmq.quantize(str(zeroed(tmp_path / "model", *endings)), tmp_path / "out", RECIPE, ids=IDS)
    assert {block.zero for block in report.blocks} == {zero}
    assert all(row.error == 0 for row in report.quantized if f"{row.name}.weight".endswith(endings))
    assert bool([w for w in report.warnings if "is zero" in w]) == zero


def test_a_signature_of_zeros() -> None:
    """Zeros that stay zeros agree; zeros that become numbers, and numbers that become zeros, do not."""
    zeros, ones = torch.zeros(2, 300), torch.ones(2, 300)
    sparse = zeros.clone()
    sparse[1, 299] = 1e3
    for value in (zeros, ones, sparse):
        check_signature({"signature": output_signature(value)}, value, "x")
    for then, now in ((zeros, ones), (ones, zeros), (zeros, sparse), (sparse, zeros), (zeros, zeros + 1e-20)):
        refused(
            lambda then=then, now=now: check_signature({"signature": output_signature(then)}, now, "x"), "read back"
        )


# Blocks that hand router states or chosen tokens to the next: both chains carry what the block before returned.

WINDOWS = tiny.tokens(4, 32, seed=2)
DENSE_OR_NOT = {"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}
CHANGES: dict[str, dict[str, Any]] = {
    "zaya": {},
    "hy_v4": {},
    "glm_moe_dsa": DENSE_OR_NOT | {"indexer_types": ["full", "shared", "full", "shared"]},
    "gemma3n_text": {},
    "gemma4_text": {},
}
"""In hy_v4 and glm_moe_dsa the tokens that attention looks at are chosen by some blocks, for the others as well; in the
last two some blocks leave keys and values in a dict, for the others."""

KEEP = {"zaya": ("experts",), "hy_v4": ("experts",)}
"""Experts that are stacks on disk stay as they are."""


def recipe_of(kind: str, method: str) -> Recipe:
    options = {"iterations": 3} if method in ("signround", "block_qat") else {}
    return Recipe(
        methods=tuple(method.split("+")), scheme=mixtures.W4, keep=KEEP.get(kind, ()), options=options, ragged="channel"
    )


def outputs_of(folder: Path, path: str) -> list[list[Tensor]]:
    """The hidden states after every block, per window, as the model that stock transformers loads computes them."""
    model, told = mixtures.load(folder)
    assert not told
    found: list[list[Tensor]] = []
    hooks = []
    for block in model.get_submodule(path).children():
        mine: list[Tensor] = []
        found.append(mine)

        def note(_: nn.Module, __: Any, output: Any, mine: list[Tensor] = mine) -> None:
            mine.append((output if isinstance(output, Tensor) else output[0]).detach())

        hooks.append(block.register_forward_hook(note))
    for window in torch.split(WINDOWS, 1):
        run(model, window)
    for hook in hooks:
        hook.remove()
    return found


def run(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def apart(states: list[States], wanted: list[Tensor]) -> float:
    value, target = torch.cat([one.hidden for one in states]), torch.cat(wanted)
    return float((value - target).norm() / target.norm())


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[States]]]:
    """What blocks handed on, in the order in which they were quantized: of the quantized and of the float chain."""
    monkeypatch.setattr(Plan, "batch", property(lambda plan: 1))
    real = stream.quantize_block
    seen: dict[str, list[list[States]]] = {"quantized": [], "float": []}

    def note(*args: Any) -> Any:
        quantized, unquantized = real(*args)
        seen["quantized"].append(quantized)
        seen["float"].append(unquantized or [])
        return quantized, unquantized

    monkeypatch.setattr(stream, "quantize_block", note)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_both_chains_are_what_stock_transformers_computes(
    kind: str, method: str, tmp_path: Path, chains: dict[str, list[list[States]]]
) -> None:
    """Of the source, and of the folder that was written; each window has values of its own, also when it is resumed."""
    source = mixtures.write(kind, tmp_path / "m", **CHANGES[kind])
    whole, copies = mixtures.before_each_commit(
        lambda out: job.quantize(str(source), out, recipe_of(kind, method), ids=WINDOWS), tmp_path / "runs"
    )
    path, out = "model.layers", tmp_path / "runs" / "whole"
    assert Report.load(out).quantized
    before, after = outputs_of(source, path), outputs_of(out, path)
    assert len(chains["quantized"]) == len(after) == 4
    for mine, wanted in zip(chains["quantized"], after, strict=True):
        assert apart(mine, wanted) <= 1e-5
    for mine, wanted in zip(chains["float"], before, strict=True):
        assert apart(mine, wanted) <= 1e-5
    assert all(apart(mine, wanted) > 1e-3 for mine, wanted in zip(chains["quantized"], before, strict=True))
    for own in chains["quantized"][:-1]:
        assert all(len(one.handed) == 1 for one in own)
        first, second, *_ = (
            list(flat([dict(v) if isinstance(v, Mapping) else v for v in one.handed.values()])) for one in own
        )
        assert len(first) >= 1 and all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(one.handed for one in chains["quantized"][-1])
    # Broken off early and late: what is replayed is one block, or all but one.
    copy = copies[-1] if method == "gptq" else copies[2]
    job.quantize(str(source), copy, recipe_of(kind, method), ids=WINDOWS)
    assert mixtures.written(copy) == whole, copy.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hy_v4", "gemma3n_text"])
def test_a_run_of_block_qat_that_was_broken_off_writes_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """All windows in one batch; values of either kind are handed on as for signround."""
    source, recipe = mixtures.write(kind, tmp_path / "m", **CHANGES[kind]), recipe_of(kind, "block_qat")
    whole, copies = mixtures.before_each_commit(
        lambda out: job.quantize(str(source), out, recipe, ids=WINDOWS), tmp_path / "runs"
    )
    job.quantize(str(source), copies[2], recipe, ids=WINDOWS)
    assert mixtures.written(copies[2]) == whole


@pytest.mark.parametrize("method", ["signround", "block_qat"])
def test_the_last_block_is_learned_from_the_logits(tiny_model: Path, tmp_path: Path, method: str) -> None:
    """Only that; what follows it leaves memory again, and a run that was broken off before it writes the same bytes."""
    recipe = Recipe(methods=(method,), scheme=Scheme(2, 32), options={"iterations": 8})
    whole, copies = mixtures.before_each_commit(
        lambda out: job.quantize(str(tiny_model), out, recipe, ids=IDS), tmp_path / "runs"
    )
    report = job.quantize(str(tiny_model), copies[-1], recipe, ids=IDS)
    assert mixtures.written(copies[-1]) == whole
    told = [[attempt.why for attempt in block.log] for block in report.blocks]
    assert told == [[""], [""], [steps.LOGITS]]
    (attempt,) = report.blocks[-1].log
    assert attempt.before is not None and attempt.after is not None and 0 < attempt.after < attempt.before


def test_its_error_is_the_divergence_of_the_whole_models(tiny_model: Path, tmp_path: Path) -> None:
    recipe = Recipe(methods=("signround",), scheme=Scheme(3, 32), options={"iterations": 8})
    report = job.quantize(str(tiny_model), tmp_path / "out", recipe, ids=IDS)
    (attempt,) = report.blocks[-1].log
    before, after = (mixtures.load(folder)[0] for folder in (tiny_model, tmp_path / "out"))
    want, have = (run(model, IDS).log_softmax(-1) for model in (before, after))
    assert attempt.after == pytest.approx(float((want.exp() * (want - have)).sum(-1).mean()), rel=1e-3)


def test_logits_that_depend_on_other_tokens_are_left_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(tail: Tail, hidden: Tensor) -> None:
        raise LlmqError("they do")

    monkeypatch.setattr(Tail, "check", check)
    recipe = Recipe(methods=("signround",), scheme=Scheme(3, 32), options={"iterations": 2})
    report = job.quantize(str(tiny_model), tmp_path / "out", recipe, ids=IDS)
    skipped, tried = report.blocks[-1].log
    assert "they do" in str(skipped) and tried.before is not None and not tried.why
