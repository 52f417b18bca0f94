"""Experts stored in one tensor and quantized with their block in memory: every entry is that of a dense reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq import job
from llmq.block.statistics import Hessian
from llmq.formats.stacks import parse
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.methods import make
from llmq.recipe.recipe import Recipe
from llmq.streaming.mixture import IDLE
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.mixtures import W4
from tests.llmq.refusal import refused
from tests.llmq.streaming.test_mixture_parts import unpacked

IDS = tiny.tokens(4, 32, seed=2)
COUNT = 4
TWO = {"num_hidden_layers": 2}
KINDS = {"llama4_text": {}, "jetmoe": TWO, "dbrx": TWO}  # llama4_text has lists with one entry per block


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of four experts; do not change it."""
    kind: str = request.param
    return mixtures.write(kind, tmp_path_factory.mktemp("models") / kind, **KINDS[kind])


def recipe(method: str, keep: tuple[str, ...] = ()) -> Recipe:
    return Recipe(methods=(method,), scheme=W4, loader="llmq", keep=keep)


def matrix(stored: dict[str, Tensor], name: str) -> Tensor:
    """The matrix [out, in] of an expert in the source, by the name that llmq gives it."""
    found = parse(name)
    assert found is not None
    parameter, expert, turned = found
    value = stored[parameter]
    value = (value if value.dim() == 3 else value.view(COUNT, -1, value.shape[1]))[expert]
    return value.T if turned else value


def test_rtn_rounds_every_entry_of_every_stack(source: Path, tmp_path: Path) -> None:
    report = job.quantize(str(source), tmp_path / "out", recipe("rtn"), ids=IDS)
    stored, found = mixtures.stored(source), unpacked(tmp_path / "out", report)
    for name, quantized in found.items():
        want = round_to_nearest(matrix(stored, name), W4, torch.float32)
        assert isinstance(want, QuantizedWeight)
        assert torch.equal(quantized.codes, want.codes) and torch.equal(quantized.scale, want.scale)
    stacks = {n: t for n, t in stored.items() if t.dim() == 3 or ".ffn.experts." in n}
    assert stacks and sum(q.codes.numel() for q in found.values()) == sum(t.numel() for t in stacks.values())
    # The stacks themselves are not written.
    assert not stacks.keys() & mixtures.stored(tmp_path / "out").keys()


def test_each_token_is_counted_at_the_experts_that_it_chose(source: Path, tmp_path: Path) -> None:
    report = job.quantize(str(source), tmp_path / "out", recipe("gptq"), ids=IDS)
    config = mixtures.load(source)[0].config.to_dict()
    k = config.get("num_experts_per_tok") or config["ffn_config"]["moe_top_k"]
    totals: dict[str, int] = {}
    for row in report.quantized:
        if row.expert is not None:
            found = parse(row.name)
            assert found is not None and row.tokens is not None
            totals[found[0]] = totals.get(found[0], 0) + row.tokens
            assert (IDLE in row.notes) is (row.tokens == 0)
    assert totals and set(totals.values()) == {k * IDS.numel()}


def test_gptq_has_the_rows_that_are_not_zero(tmp_path: Path) -> None:
    """All else is kept, so that what enters the first block's experts is stock transformers' own."""
    source = mixtures.write("llama4_text", tmp_path / "m")
    wanted = recipe("gptq", ("self_attn", "shared_expert"))
    report = job.quantize(str(source), tmp_path / "out", wanted, ids=IDS)
    stored, found = mixtures.stored(source), unpacked(tmp_path / "out", report)
    model, _ = mixtures.load(source)
    with mixtures.calls_of(model.model.layers[0].feed_forward.experts) as seen, torch.no_grad():
        model(IDS, use_cache=False)
    ((given,), _) = seen[0]
    tokens = {row.name: row.tokens for row in report.quantized}
    quantizer, prefix = make(wanted).quantizer, "model.layers.0.feed_forward.experts"
    for expert, rows in enumerate(given.view(COUNT, -1, given.shape[-1])):
        own = rows[rows.any(-1)]
        gate, up = (own @ stored[f"{prefix}.gate_up_proj"][expert]).chunk(2, -1)
        for name, x in (("gate_up_proj", own), ("down_proj", up * torch.nn.functional.silu(gate))):
            hessian = Hessian(x.shape[1], torch.device("cpu"))
            hessian.update(x)
            full = f"{prefix}.{expert}.{name}.T"
            want = quantizer.quantize(matrix(stored, full), W4, {Hessian: hessian}, torch.float32)
            assert isinstance(want, QuantizedWeight)
            assert float((found[full].codes != want.codes).float().mean()) < 5e-3
            assert tokens[full] == len(own)


def test_a_number_that_is_not_finite_is_named_with_its_place(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, model := tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = mixtures.stored(source)
    name = next(n for n, t in tensors.items() if t.dim() == 3 or ".ffn.experts." in n)
    tensors[name][3, 1] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(lambda: job.quantize(str(model), tmp_path / "out", recipe("rtn"), ids=IDS), name, "nan at [3, 1")


@pytest.mark.parametrize(("kind", "keep"), [("jetmoe", ("input_linear", "output_linear")), ("dbrx", ("experts",))])
def test_other_weights_alone_are_for_everyone(kind: str, keep: tuple[str, ...], tmp_path: Path) -> None:
    source = mixtures.write(kind, tmp_path / "m")
    refused(lambda: job.plan(str(source), Recipe(methods=("rtn",), scheme=W4), ids=IDS), "--loader llmq", "--keep")
    made = job.plan(str(source), recipe("rtn", keep), ids=IDS)
    assert not made.for_llmq_alone and not any(block.parts for block in made.blocks)


def test_where_transformers_makes_linear_layers_of_experts_they_cannot_be_kept(tmp_path: Path) -> None:
    source = mixtures.write("llama4_text", tmp_path / "m")
    said = refused(lambda: job.plan(str(source), recipe("rtn", ("experts",)), ids=IDS), "--loader llmq")
    assert "makes linear layers of these experts" in said and "feed_forward.experts." in said
    assert job.plan(str(source), recipe("rtn"), ids=IDS).for_llmq_alone
