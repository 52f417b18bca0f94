"""--route all: experts are calibrated with every token, and what they add to the block is still of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq import job
from llmq.checkpoint.files import INDEX
from llmq.methods import Hessian, Method
from llmq.methods.gptq import GPTQ
from llmq.recipe.recipe import Recipe
from llmq.streaming import mixture
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32, seed=2)
# Attention is kept, so that what enters the first block's experts is what stock transformers gives them.
ALL = Recipe(methods=("gptq",), scheme=mixtures.W4, keep=("self_attn",), route="all")
OWN = replace(ALL, route="own")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of four experts, of which each token chooses two; do not change it."""
    return mixtures.write("qwen3_moe", tmp_path_factory.mktemp("models") / "mixture", num_hidden_layers=1)


def experts_call(folder: Path) -> tuple[Any, Tensor, Tensor]:
    """The experts' module of a folder's only block in stock transformers, what enters it and what it returns."""
    model, told = mixtures.load(folder)
    assert not told
    experts = model.model.layers[0].mlp.experts
    with mixtures.calls_of(experts) as seen, torch.no_grad():
        model(IDS, use_cache=False)
    ((rows, *_), output) = seen[0]
    return experts, rows, output


def test_each_experts_hessians_are_of_all_rows_and_its_outputs_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real, real_outputs = GPTQ.quantize, mixture.outputs
    sums: list[Tensor] = []

    def note(self: Method, weight: Tensor, scheme: Any, stats: Any, dtype: torch.dtype) -> Any:
        found = stats[Hessian]
        seen.append(found.total.double() / found.count)
        assert found.count == IDS.numel()
        return real(self, weight, scheme, stats, dtype)  # type: ignore[arg-type]

    def note_sums(block: Any, hidden: Any, calls: Any, totals: Any, device: Any) -> Any:
        sums.append(torch.cat([*totals]))
        return real_outputs(block, hidden, calls, totals, device)

    made = job.plan(str(source), ALL, ids=IDS)
    monkeypatch.setattr(GPTQ, "quantize", note)
    monkeypatch.setattr(mixture, "outputs", note_sums)
    report = job.quantize(str(source), tmp_path / "out", made=made)
    monkeypatch.undo()
    experts, rows, float_output = experts_call(source)
    x = rows.double()
    entering = x.t() @ x / len(x)
    assert len(seen) == 4 * 3
    for expert in range(4):
        gate, up = (x @ experts.gate_up_proj.detach()[expert].double().t()).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for found, want in zip(seen[3 * expert :], (entering, entering, inner.t() @ inner / len(x)), strict=False):
            assert torch.allclose(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    # The block goes on with what the written experts return for the tokens that chose them, and the target is as ever.
    assert torch.allclose(sums[0], experts_call(tmp_path / "out")[2], rtol=1e-4, atol=1e-5)
    assert torch.allclose(sums[1], float_output, rtol=1e-4, atol=1e-5)
    rows_of = [row for row in report.quantized if row.expert is not None]
    plain = job.quantize(str(source), tmp_path / "own", OWN, ids=IDS)
    assert len(rows_of) == 12 and {row.alpha for row in rows_of} == {0}
    assert [row.tokens for row in rows_of] == [row.tokens for row in plain.quantized if row.expert is not None]
    assert sum(row.tokens or 0 for row in rows_of) == 3 * 2 * IDS.numel()


def test_a_run_is_not_resumed_with_another_route(source: Path, tmp_path: Path) -> None:
    job.quantize(str(source), tmp_path / "out", ALL, ids=IDS)
    refused(lambda: job.quantize(str(source), tmp_path / "out", OWN, ids=IDS), "recipe: route all → own")


def test_without_calibration_it_is_refused_and_without_experts_it_changes_nothing(source: Path, tmp_path: Path) -> None:
    rtn = replace(ALL, methods=("rtn",))
    refused(lambda: job.plan(str(source), rtn, ids=IDS), "--route all", "rtn")
    dense = mixtures.write("llama", tmp_path / "dense", num_hidden_layers=1)
    written = {}
    for recipe in (ALL, OWN):
        made = job.plan(str(dense), recipe, ids=IDS)
        assert any("--route all changes nothing" in warning for warning in made.warnings) is (recipe is ALL)
        job.quantize(str(dense), out := tmp_path / recipe.route, made=made)
        written[recipe.route] = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
        assert (out / INDEX).is_file()
    assert written["all"] == written["own"]


@pytest.mark.parametrize("method", ["awq+gptq", "signround"])
def test_transforms_and_refinements_see_all_tokens_too(method: str, source: Path, tmp_path: Path) -> None:
    """Every expert's weights come nearer to what they compute of all tokens than with its own alone."""
    options = {"iterations": 60} if method == "signround" else {}
    _, rows, _ = experts_call(source)
    error = {}
    ones = torch.ones(len(rows), 1)
    for recipe in (ALL, OWN):
        made = replace(recipe, methods=tuple(method.split("+")), options=options, scheme=replace(mixtures.W4, bits=3))
        job.quantize(str(source), out := tmp_path / recipe.route, made, ids=IDS)
        whole, found = experts_call(source)[0], experts_call(out)[0]
        with torch.no_grad():
            error[recipe.route] = sum(
                float((found(rows, choice, ones) - whole(rows, choice, ones)).norm())
                for choice in (torch.full((len(rows), 1), expert) for expert in range(4))
            )
    assert error["all"] < 0.98 * error["own"]
