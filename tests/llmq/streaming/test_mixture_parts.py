"""Experts quantized with their block in memory: equal to a dense reference, in any groups, broken off anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq import formats, job
from llmq.block.block import Block
from llmq.block.expert import ExpertBlock
from llmq.block.group import GroupBlock
from llmq.block.statistics import Hessian
from llmq.checkpoint.sink import Sink
from llmq.discovery import blocks as discover
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.methods import Pipeline, make
from llmq.planning import parts as planning
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.streaming import steps
from llmq.streaming.mixture import IDLE
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.mixtures import Broken, breaking
from tests.llmq.planning.test_experts import exact, twin
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32, seed=2)
W4 = mixtures.W4
GPTQ, RTN = Recipe(methods=("gptq",), scheme=W4), Recipe(methods=("rtn",), scheme=W4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of four experts, stored one by one, and two that return their input; do not change it."""
    return mixtures.write("longcat_flash", tmp_path_factory.mktemp("models") / "m", num_layers=2)


def groups_of(monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    real = planning.group_parts

    def group(index: int, items: Any, dtype: torch.dtype, statistics: Any) -> Any:
        # As if every expert needed just so much memory.
        held = sum(i.shape[0] * i.shape[1] for i in items if i.expert is not None) * dtype.itemsize
        return real(index, items, dtype, lambda one: held // 2 // experts - planning.codes(one))

    monkeypatch.setattr("llmq.planning.plan.group_parts", group)


def unpacked(folder: Path, report: Report) -> dict[str, QuantizedWeight]:
    """The experts' weights as written."""
    stored, found = mixtures.stored(folder), {}
    for row in report.quantized:
        if row.expert is not None:
            mine = {n.removeprefix(f"{row.name}."): t for n, t in stored.items() if n.startswith(f"{row.name}.")}
            assert row.scheme is not None
            value = formats.of(row.scheme).unpack(mine, row.scheme)
            assert isinstance(value, QuantizedWeight)
            found[row.name] = value
    return found


# What one expert is quantized to.


def test_rtn_rounds_every_experts_matrix(source: Path, tmp_path: Path) -> None:
    report = job.quantize(str(source), tmp_path / "out", RTN, ids=IDS)
    stored, found = mixtures.stored(source), unpacked(tmp_path / "out", report)
    assert len(found) == 2 * (4 * 3 + 2 * 2)
    for name, quantized in found.items():
        want = round_to_nearest(stored[f"{name}.weight"], W4, torch.float32)
        assert isinstance(want, QuantizedWeight)
        assert torch.equal(quantized.codes, want.codes) and torch.equal(quantized.scale, want.scale)
    assert not any(IDLE in row.notes for row in report.quantized)


def routed(model: Any, block: int) -> tuple[Tensor, Tensor]:
    """What enters the experts of a block in stock transformers: rows and choices."""
    with mixtures.calls_of(model.model.layers[block].mlp.experts) as seen, torch.no_grad():
        model(IDS, use_cache=False)
    (((rows, choices, _), _),) = seen
    return rows, choices


def test_gptq_has_the_rows_that_chose_an_expert(source: Path, tmp_path: Path) -> None:
    """All else is kept, so that the inputs of the first block's experts are stock transformers' own."""
    keep = ("self_attn", "mlps")
    report = job.quantize(str(source), tmp_path / "out", Recipe(methods=("gptq",), scheme=W4, keep=keep), ids=IDS)
    stored, found = mixtures.stored(source), unpacked(tmp_path / "out", report)
    model, _ = mixtures.load(source)
    rows, choices = routed(model, 0)
    assert {4, 5} & set(choices.flatten().tolist())  # some tokens go past the experts
    quantizer = make(GPTQ).quantizer
    tokens = {row.name: row.tokens for row in report.quantized}
    notes = {row.name: row.notes for row in report.quantized}
    for expert in range(6):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        mine = rows[(choices == expert).any(1)] if expert < 4 else rows[:0]
        inputs = {"gate_proj": mine, "up_proj": mine}
        if expert < 4:
            gate, up = (mine @ stored[f"{prefix}.{name}.weight"].t() for name in inputs)
            inputs["down_proj"] = torch.nn.functional.silu(gate) * up
        for name, x in inputs.items():
            hessian = Hessian(x.shape[1], torch.device("cpu"))
            hessian.update(x)
            weight = stored[f"{prefix}.{name}.weight"]
            want = quantizer.quantize(weight, W4, {Hessian: hessian}, torch.float32)
            assert isinstance(want, QuantizedWeight)
            got = found[f"{prefix}.{name}"]
            assert float((got.codes != want.codes).float().mean()) < 5e-3
            nearest = round_to_nearest(weight, W4, torch.float32)
            assert isinstance(nearest, QuantizedWeight)
            assert expert > 3 or float((got.codes != nearest.codes).float().mean()) > 0.1
            assert tokens[f"{prefix}.{name}"] == len(x)
            assert (IDLE in notes[f"{prefix}.{name}"]) is (expert > 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq", "signround", "block_qat"])
def test_stock_transformers_loads_what_is_written(method: str, source: Path, tmp_path: Path) -> None:
    # signround: enough steps that the rest of a block and its experts both learn.
    options = {"signround": {"iterations": 12}, "block_qat": {"iterations": 2}}.get(method, {})
    recipe = Recipe(methods=tuple(method.split("+")), scheme=W4, options=options)
    report = job.quantize(str(source), tmp_path / "out", recipe, ids=IDS)
    loaded, told = mixtures.load(tmp_path / "out")
    assert not told
    dense, told = mixtures.load(twin(source, tmp_path / "out", report, tmp_path / "twin"))
    assert not told
    before, _ = mixtures.load(source)
    got, want, original = (mixtures.logits(m) for m in (loaded, dense, before))
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert 1e-3 < float((want - original).norm() / original.norm()) < 1


@pytest.mark.slow
def test_experts_at_other_bits_than_the_rest(source: Path, tmp_path: Path) -> None:
    report = exact(source, tmp_path, overrides=(("experts", Scheme(8, 16)),))
    assert {row.scheme.bits for row in report.quantized if row.expert is not None} == {8}


# Groups, and runs that end early.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_groups_of_any_size_give_the_same_tensors(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(methods=tuple(method.split("+")), scheme=W4)

    def quantize(size: int, out: Path) -> None:
        with monkeypatch.context() as patch:
            groups_of(patch, size)
            job.quantize(str(source), out, recipe, ids=IDS)

    # awq+gptq in groups of three or in one; rtn has groups of one as well.
    sizes = (1, 3, 6)[method != "rtn" :]
    mixtures.check_groups(quantize, tmp_path, sizes, lambda size: 1 + 2 * (1 + -(-6 // size)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "signround"])  # gptq and others: test_mixture.py
def test_broken_off_before_any_commit_a_run_resumes_with_the_same_bytes(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups_of(monkeypatch, 3)
    monkeypatch.setattr(Plan, "batch", property(lambda plan: 1))
    recipe = Recipe(methods=(method,), scheme=W4, options={"iterations": 2} if method == "signround" else {})
    # Each method before every other commit: together before all of them.
    mixtures.check_resumes(
        lambda out: job.quantize(str(source), out, recipe, ids=IDS),
        tmp_path,
        commits=1 + 2 * (2 + 1),
        weights=2 * (16 + 4 * 3 + 2 * 2),
        ended=slice(0 if method == "rtn" else 1, None, 2),
    )


@pytest.mark.slow
def test_finished_groups_are_not_quantized_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups_of(monkeypatch, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "commit", breaking(1 + 3 + 1))
        with pytest.raises(Broken):
            job.quantize(str(source), tmp_path / "out", RTN, ids=IDS)
    quantized: list[str] = []
    real = steps.quantize

    def note(block: Block, pipeline: Pipeline) -> None:
        quantized.append("group" if isinstance(block, GroupBlock) else "block")
        real(block, pipeline)

    monkeypatch.setattr(steps, "quantize", note)
    job.quantize(str(source), tmp_path / "out", RTN, ids=IDS)
    assert quantized == ["block", "group"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sources_of_half_precision(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    model, _ = mixtures.load(source)
    model.to(dtype).save_pretrained(tmp_path / "m")
    report = job.quantize(str(tmp_path / "m"), tmp_path / "out", GPTQ, ids=IDS)
    assert all(block.error < 0.3 for block in report.blocks)
    assert {q.scale.dtype for q in unpacked(tmp_path / "out", report).values()} == {dtype}


# Damage and doubt.


@pytest.mark.parametrize("name", ["2.gate_proj", "1.down_proj", "5.up_proj"])
def test_a_number_that_is_not_finite_in_one_expert_is_named(name: str, source: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "m").mkdir()
    tensors = mixtures.stored(source)
    name = f"model.layers.1.mlp.experts.{name}.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    refused(lambda: job.quantize(str(folder), tmp_path / "out", RTN, ids=IDS), name, "model.safetensors")


def test_routers_are_ignored_by_name(source: Path) -> None:
    ignored = job.config(job.plan(str(source), RTN, ids=IDS))["quantization_config"]["ignore"]
    assert {f"model.layers.{i}.mlp.router.classifier" for i in range(2)} <= set(ignored)


def test_the_log_says_of_which_experts_an_attempt_was(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(methods=("signround",), scheme=W4, options={"iterations": 1})
    report = job.quantize(str(source), tmp_path / "out", recipe, ids=IDS)
    for block in report.blocks:
        # What a refinement learns of two experts is more than half of the experts' memory.
        assert [attempt.where for attempt in block.log] == [None, *(f"expert {e}" for e in range(6))]
    units = [json.loads(line).get("unit") for line in (tmp_path / "out" / ".llmq" / "journal.jsonl").open()]
    assert units[1:-1] == [f"block {b}{of}" for b in range(2) for of in (*(f", expert {e}" for e in range(6)), "")]


# The same experts, one at a time and with their block in memory.


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [1, 2])
def test_in_memory_as_one_at_a_time(chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other tokens' statistics and with weights of 1: the same bytes where both add up rows in one order.

    A row that chose two experts enters the second product later in transformers' own loop than in llmq's.
    """
    model = mixtures.write("qwen3_moe", tmp_path / "m", num_hidden_layers=1, num_experts_per_tok=chosen)
    monkeypatch.setattr("llmq.block.expert.PRIOR_TOKENS", 0)
    monkeypatch.setattr(ExpertBlock, "feeding", lambda self, statistic: statistic)
    one = job.quantize(str(model), tmp_path / "one", GPTQ, ids=IDS)
    assert all(block.experts is not None for block in mixtures.structure("qwen3_moe").blocks)
    with monkeypatch.context() as patch:
        patch.setattr(discover, "describe", lambda *args: "not this time")
        made = job.plan(str(model), GPTQ, ids=IDS)
        assert made.blocks[0].parts is not None and made.blocks[0].experts is None
        many = job.quantize(str(model), tmp_path / "many", GPTQ, ids=IDS)
    tokens = [{row.name: row.tokens for row in report.quantized} for report in (one, many)]
    assert tokens[0] == tokens[1]
    got, want = unpacked(tmp_path / "many", many), unpacked(tmp_path / "one", one)
    assert got.keys() == want.keys() and len(got) == 12
    for name, quantized in got.items():
        wrong = float((quantized.codes != want[name].codes).float().mean())
        assert wrong == 0 if chosen == 1 else wrong < 2e-3
    if chosen == 1:
        first, second = mixtures.stored(tmp_path / "one"), mixtures.stored(tmp_path / "many")
        assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
