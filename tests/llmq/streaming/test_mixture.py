"""Experts one at a time: they add up to what all of them compute, in groups of any size, and broken off anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq import job
from llmq.block.block import Block
from llmq.block.expert import OTHERS, ExpertBlock
from llmq.checkpoint.sink import Sink
from llmq.discovery.experts import Expert, Routed
from llmq.methods import Pipeline
from llmq.planning import experts as planning
from llmq.planning.plan import BlockPlan, Plan
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from llmq.streaming import mixture, steps, stream
from llmq.streaming.block_io import BlockIO
from llmq.watch import Silent
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.mixtures import Broken, breaking, written
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32, seed=2)
CPU = torch.device("cpu")
GPTQ, RTN = Recipe(methods=("gptq",), scheme=mixtures.W4), Recipe(methods=("rtn",), scheme=mixtures.W4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of four experts, of which each token chooses two; do not change it."""
    return mixtures.write("qwen3_moe", tmp_path_factory.mktemp("models") / "mixture", num_hidden_layers=2)


def groups_of(monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    monkeypatch.setattr(planning, "GROUP_EXPERTS", experts)


def in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window per batch."""
    monkeypatch.setattr(Plan, "batch", property(lambda plan: 1))


def opened(folder: Path) -> BlockIO:
    """Reads a folder; nothing is written."""
    return BlockIO(job.plan(str(folder), GPTQ, ids=IDS), CPU, Sink(folder, 0, -1))


# What one expert after the other computes.


def test_the_sums_are_what_stock_transformers_experts_return(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_batches(monkeypatch)
    io = opened(source)
    recording = stream.record_calls(io, Silent())
    states = recording.states()
    model, _ = mixtures.load(source)
    for block in io.plan.blocks:
        assert block.experts is not None
        experts = model.get_submodule(f"{block.name}.{block.experts.info.module}")
        with mixtures.calls_of(experts) as seen, mixtures.calls_of(model.get_submodule(block.name)) as outer:
            for batch in torch.split(IDS, 1):
                model(batch, use_cache=False)
        hidden, calls = stream.hidden_of(states), recording.of_block(block.index, states)
        io.fill(block)
        routed = mixture.entering(block, hidden, calls, CPU)
        assert len(routed) == len(seen) == len(IDS)
        for mine, ((rows, choices, weights), _) in zip(routed, seen, strict=True):
            assert torch.equal(mine.choices, choices)
            assert torch.allclose(mine.rows, rows, atol=1e-5) and torch.allclose(mine.weights, weights, atol=1e-5)
        sums = mixture.unrounded(io, block, routed)
        for total, (_, output) in zip(sums, seen, strict=True):
            assert torch.allclose(total, output, rtol=1e-4, atol=1e-5)
        states = mixture.outputs(block, hidden, calls, sums, CPU)
        for mine_out, (_, output) in zip(states, outer, strict=True):
            assert torch.allclose(mine_out.hidden, output, rtol=1e-4, atol=1e-5)
        assert all(p.is_meta for n, p in block.module.named_parameters() if n in block.streamed)


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral", "nemotron_h", "deepseek_v4"])
def test_the_sums_of_experts_with_biases_transposed_or_not_gated(kind: str) -> None:
    model: Any = tiny.model(kind)
    model.set_experts_implementation("eager")
    name, info = next((b.name, b.experts) for b in mixtures.structure(kind).blocks if b.experts is not None)
    module = model.get_submodule(f"{name}.{info.module}")
    with mixtures.calls_of(module) as seen:
        mixtures.logits(model)
    ((rows, choices, weights), output) = seen[0]
    sums = mixture.Sums([Routed(*(t[half] for t in (rows, choices, weights))) for half in (slice(30), slice(30, None))])
    for expert in range(info.count):
        entries = {n: module.get_parameter(n).data[expert] for n in info.parameters}
        sums.add(expert, mixture.run(Expert(module, info.call, entries), sums.rows(expert), CPU))
    assert torch.allclose(torch.cat(sums.totals), output, rtol=1e-4, atol=1e-5)


def test_an_experts_rows_their_weights_and_others() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for tokens in (50, 70):
        choices = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)])
        rows = torch.randn(tokens, 3, generator=generator)
        batches.append(Routed(rows, choices, torch.rand(tokens, 2, generator=generator)))
    sums = mixture.Sums(batches)
    for expert in range(6):
        want = [
            (r, w)
            for b in batches
            for r, c, ws in zip(b.rows, b.choices, b.weights, strict=True)
            for e, w in zip(c, ws, strict=True)
            if e == expert
        ]
        assert torch.equal(sums.rows(expert), torch.stack([r for r, _ in want]))
        assert torch.equal(sums.weights(expert), torch.stack([w for _, w in want]))
        others = {tuple(row.tolist()) for row in sums.others(expert)}
        mine = {tuple(row.tolist()) for row, _ in want}
        every = {tuple(row.tolist()) for b in batches for row in b.rows}
        assert others == every - mine  # fewer than 128
    assert len(sums.rows(7)) == len(sums.weights(7)) == 0
    sums.add(7, torch.empty(0, 3))
    assert not any(t.any() for t in sums.totals)


def test_others_are_at_most_128_spread_over_all_batches() -> None:
    choices = torch.zeros(400, 1, dtype=torch.long)
    batches = [Routed(torch.full((400, 1), float(i)), choices, torch.ones(400, 1)) for i in range(3)]
    others = mixture.Sums(batches).others(1)
    assert len(others) == OTHERS
    counts = others[:, 0].long().bincount().tolist()
    assert len(counts) == 3 and max(counts) - min(counts) <= 1
    assert not len(mixture.Sums(batches).others(0))


# Groups, and runs that end early.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_groups_of_any_size_give_the_same_tensors(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(methods=tuple(method.split("+")), scheme=mixtures.W4)

    def quantize(size: int, out: Path) -> None:
        groups_of(monkeypatch, size)
        job.quantize(str(source), out, recipe, ids=IDS)

    # Three and one, or all four in one; rtn has groups of one as well.
    mixtures.check_groups(quantize, tmp_path, (1, 3, 4)[method != "rtn" :], lambda size: 3 + 2 * -(-4 // size))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq+rtn", "block_qat"])  # signround: test_mixture_parts.py
def test_broken_off_before_any_commit_a_run_resumes_with_the_same_bytes(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups_of(monkeypatch, 1)
    in_batches(monkeypatch)
    options = {"iterations": 2} if method in ("signround", "block_qat") else {}
    recipe = Recipe(methods=tuple(method.split("+")), scheme=mixtures.W4, options=options)
    # gptq and awq+rtn in turn, together before every commit. The others: before a block's first expert, before its
    # last, between them, and before the rest of a block.
    ended = {"gptq": slice(0, None, 2), "awq+rtn": slice(1, None, 2)}
    mixtures.check_resumes(
        lambda out: job.quantize(str(source), out, recipe, ids=IDS),
        tmp_path,
        commits=1 + 2 * (4 + 1),
        weights=2 * (4 + 4 * 3),
        ended=ended.get(method, slice(1, None, 3)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sources_of_half_precision(
    dtype: torch.dtype, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are kept in float32; what is read back is what was in memory, here as well."""
    model, _ = mixtures.load(source)
    model.to(dtype).save_pretrained(tmp_path / "m")
    groups_of(monkeypatch, 1)
    job.quantize(str(tmp_path / "m"), tmp_path / "whole", GPTQ, ids=IDS)
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "commit", breaking(8))
        with pytest.raises(Broken):
            job.quantize(str(tmp_path / "m"), tmp_path / "out", GPTQ, ids=IDS)
    report = job.quantize(str(tmp_path / "m"), tmp_path / "out", GPTQ, ids=IDS)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert all(block.error < 0.2 for block in report.blocks)
    scales = {n: t.dtype for n, t in mixtures.stored(tmp_path / "out").items() if n.endswith("weight_scale")}
    assert set(scales.values()) == {dtype} and len(scales) == 2 * (4 + 4 * 3)


@pytest.mark.slow
def test_groups_that_are_finished_are_read_and_not_quantized_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups_of(monkeypatch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "commit", breaking(1 + 5 + 2))
        with pytest.raises(Broken):
            job.quantize(str(source), tmp_path / "out", RTN, ids=IDS)
    shards = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("model-*")}
    quantized: list[str] = []
    real = steps.quantize

    def note(block: Block, pipeline: Pipeline) -> None:
        quantized.append("expert" if isinstance(block, ExpertBlock) else "block")
        real(block, pipeline)

    restored: list[tuple[int, int]] = []
    real_restore = BlockIO.restore_expert

    def note_restored(io: BlockIO, block: BlockPlan, expert: int) -> Any:
        restored.append((block.index, expert))
        return real_restore(io, block, expert)

    monkeypatch.setattr(steps, "quantize", note)
    monkeypatch.setattr(BlockIO, "restore_expert", note_restored)
    job.quantize(str(source), tmp_path / "out", RTN, ids=IDS)
    # The rest of the second block is not written before its experts, so it is quantized again; two experts are left.
    assert quantized == ["block", "expert", "expert"]
    verified = [(b, e) for b in range(2) for e in range(4)]
    assert restored == [(0, e) for e in range(4)] + [(1, 0), (1, 1)] + verified
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in shards} == shards


# Damage.


@pytest.mark.slow
def test_a_changed_byte_in_an_experts_shard_is_noticed_by_the_run_that_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups_of(monkeypatch, 1)
    job.quantize(str(source), tmp_path / "whole", RTN, ids=IDS)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "commit", breaking(5))
        with pytest.raises(Broken):
            job.quantize(str(source), out, RTN, ids=IDS)
    shard = sorted(out.glob("model-*"))[2]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    job.quantize(str(source), out, RTN, ids=IDS, watch=Noting())
    (said,) = notes
    assert shard.name in said and "was changed since it was written: block 0, expert 1" in said
    assert written(out) == written(tmp_path / "whole")


def test_a_written_expert_that_is_read_back_wrong_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard damaged while the run goes on: what is verified is what lies on the disk."""
    real = Sink.commit

    def commit(sink: Sink, unit: str, tensors: Any, payload: Any) -> None:
        if unit == "block 1, experts 0–3":
            scale = next(name for name in tensors if "experts.2.up" in name and name.endswith("scale"))
            shard = sink.out / f"model-{len(sink.done) + 1:05d}-of-{sink.units:05d}.safetensors"
            real(sink, unit, tensors, payload)
            save_file(load_file(shard) | {scale: tensors[scale] * 1.5}, shard)
            return
        real(sink, unit, tensors, payload)

    monkeypatch.setattr(Sink, "commit", commit)
    refused(lambda: job.quantize(str(source), tmp_path / "out", RTN, ids=IDS), "model.layers.1", "read back from disk")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_a_number_that_is_not_finite_in_one_expert_is_named(part: str, source: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "m").mkdir()
    tensors = mixtures.stored(source)
    name = f"model.layers.1.mlp.experts.2.{part}.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    refused(lambda: job.quantize(str(folder), tmp_path / "out", RTN, ids=IDS), name, "model.safetensors")


def test_an_expert_that_cannot_be_quantized_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmq.errors import LlmqError

    real = steps.quantize

    def fail(block: Block, pipeline: Pipeline) -> None:
        if isinstance(block, ExpertBlock) and any("layers.1.mlp.experts.3." in s.name for s in block.weights.values()):
            raise LlmqError("not this one")
        real(block, pipeline)

    monkeypatch.setattr(steps, "quantize", fail)
    refused(lambda: job.quantize(str(source), tmp_path / "out", RTN, ids=IDS), "layers.1.mlp.experts, expert 3: not")


@pytest.mark.slow
def test_an_expert_that_no_token_chose_is_quantized_by_the_others(tmp_path: Path) -> None:
    """0 tokens of its own, and yet nearer to what it computes of other tokens than rounding to nearest is."""
    folder = mixtures.write("qwen3_moe", tmp_path / "m", num_hidden_layers=1)
    tensors = {name: tensor.clone() for name, tensor in mixtures.stored(folder).items()}
    # Every row has a large first channel, which counts against expert 1.
    tensors["model.embed_tokens.weight"][:, 0] = 30
    tensors["model.layers.0.post_attention_layernorm.weight"].abs_()
    tensors["model.layers.0.mlp.gate.weight"][1] = 0
    tensors["model.layers.0.mlp.gate.weight"][1, 0] = -100
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    outputs = {}
    model, _ = mixtures.load(folder)
    with mixtures.calls_of(model.model.layers[0].mlp.experts) as seen:
        mixtures.logits(model)
    ((rows, choices, _), _) = seen[0]
    assert 1 not in choices
    for recipe in (RTN, GPTQ):
        out = tmp_path / recipe.methods[0]
        job.quantize(str(folder), out, recipe, ids=IDS)
        lines = [json.loads(line) for line in (out / ".llmq" / "journal.jsonl").read_text().splitlines()]
        counted = {
            row["name"]: row["tokens"]
            for e in lines
            for row in e.get("payload", {}).get("weights", [])
            if row.get("tokens") is not None
        }
        assert len(counted) == 12 and {n for name, n in counted.items() if ".experts.1." in name} == {0}
        loaded, told = mixtures.load(out)
        assert not told
        outputs[recipe.methods[0]] = loaded.model.layers[0].mlp.experts
    one, full = torch.full((len(rows), 1), 1), torch.ones(len(rows), 1)
    with torch.no_grad():
        want = model.model.layers[0].mlp.experts(rows, one, full)
        error = {method: float((experts(rows, one, full) - want).norm()) for method, experts in outputs.items()}
    assert error["gptq"] < 0.8 * error["rtn"]


@pytest.mark.slow
def test_what_a_method_tried_on_every_expert_is_reported(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(methods=("awq", "gptq"), scheme=mixtures.W4)
    report = job.quantize(str(source), tmp_path / "out", recipe, ids=IDS)
    for block in report.blocks:
        tried = [attempt for attempt in block.log if attempt.expert is not None]
        assert {attempt.expert for attempt in tried} == {0, 1, 2, 3}
        for expert in range(4):
            where = [attempt.where for attempt in tried if attempt.expert == expert]
            assert where == ["gate_up_proj → down_proj", None]
        assert str(tried[0]).startswith("expert 0: awq: gate_up_proj → down_proj: error 0.")
    assert Report.load(tmp_path / "out").blocks == report.blocks
