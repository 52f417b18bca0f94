"""Experts on every grid: what stock transformers reads, and what only vLLM and llmq.load do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import llmq
from llmq import formats, job
from llmq.formats.compressed_tensors.config import config_of
from llmq.formats.inspection import inspect_folder
from llmq.formats.served import WORDS, guarded, loader
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.served import check_served, for_servers, uneven
from llmq.planning.weights import BY_USER, WeightPlan
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.planning.made import item
from tests.llmq.refusal import refused

IDS = tiny.tokens(2, 24)
NV, MX8, MX6 = Scheme(4, 16, grid="nvfp4"), Scheme(8, 32, grid="mxfp8"), Scheme(6, 32, grid="mxfp6")
BLOCKS = Scheme(8, 128, grid="fp8-block", activations=Activations())


def recipe(scheme: Scheme, **more: Any) -> Recipe:
    return Recipe(methods=("rtn",), scheme=scheme, **more)


def write(kind: str, folder: Path, width: int) -> Path:
    """A mixture of one block, whose matrices all have this width."""
    names = ("hidden_size", "moe_intermediate_size", "intermediate_size")
    known = {name: width for name in names if hasattr(tiny.config(kind), name)}
    return mixtures.write(kind, folder, num_hidden_layers=1, **known)


def twin(model: Path, report: Report, out: Path, folder: Path) -> Any:
    """The source with the dequantized weights, in bfloat16."""
    state = mixtures.stored(model)
    mixtures.put_quantized(state, report, mixtures.stored(out))
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


STOCK = [
    ("qwen3_moe", Scheme(4, 32, grid="mxfp4")),
    ("mixtral", Scheme(6, 32, grid="mxfp6")),
    ("olmoe", Scheme(2, 32, grid="ternary")),
    ("mixtral", Scheme(4, 32, scales="pow2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), STOCK, ids=str)
def test_experts_in_stock_transformers(kind: str, scheme: Scheme, tmp_path: Path) -> None:
    """The dequantized weights' logits; the integers' attention is multiplied packed there, in another order."""
    if scheme.grid == "mxfp6" and "MXFP6A16" not in PRESET_SCHEMES:
        pytest.skip("this compressed-tensors has no mxfp6")
    model = write(kind, tmp_path / "m", 64)
    report = job.quantize(str(model), tmp_path / "out", recipe(scheme), ids=IDS)
    assert sum(".experts." in row.name for row in report.quantized) == 12
    want = mixtures.logits(twin(model, report, tmp_path / "out", tmp_path / "twin")).float()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    off = float((mixtures.logits(stock).float() - want).norm() / want.norm())
    assert off == 0 if scheme.rules.layout else off < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), [("qwen3_moe", NV), ("mixtral", MX8), ("qwen3_moe", BLOCKS)], ids=str)
def test_experts_that_stock_transformers_would_read_wrong(kind: str, scheme: Scheme, tmp_path: Path) -> None:
    """Refused without --loader vllm; with it stock transformers refuses the folder, and llmq.load reads it exactly."""
    model, out = write(kind, tmp_path / "m", scheme.step or 64), tmp_path / "out"
    refused(lambda: job.plan(str(model), recipe(scheme), ids=IDS), "transformers ", "--loader vllm", "--keep ")
    # The keys' and values' outputs are no whole blocks.
    keep = ("self_attn",) if scheme == BLOCKS else ()
    report = job.quantize(str(model), out, recipe(scheme, loader="vllm", keep=keep), ids=IDS)
    assert "llmq.load makes it dense" in report.loaders[0] and "transformers" not in report.examples
    with pytest.raises(ValueError, match=WORDS):
        AutoModelForCausalLM.from_pretrained(out)
    want = mixtures.logits(twin(model, report, out, tmp_path / "twin"))
    got = mixtures.logits(llmq.load(out, device_map="cpu", dtype="bfloat16").eval())
    if scheme.activations is None:
        assert torch.equal(got, want)
    rows = [row for row in inspect_folder(out).rows if ".experts." in row.name]
    assert len(rows) == 12 and {row.bits for row in rows} == {scheme.bits}
    assert all(scheme.group_size == (row.group or row.shape[1]) for row in rows)
    divisors = {n: t for n, t in mixtures.stored(out).items() if n.endswith("weight_global_scale")}
    assert bool(divisors) == (scheme == NV)
    for name in [name for name in divisors if "gate_proj" in name]:
        assert torch.equal(divisors[name], divisors[name.replace("gate_proj", "up_proj")])


def expert(name: str, scheme: Scheme | None, rows: int = 128) -> WeightPlan:
    return item(f"x.0.experts.0.{name}", (rows, 128), scheme, expert=0)


def test_who_reads_experts() -> None:
    for scheme, stock, served in (
        (Scheme(4, 32), True, True),
        (Scheme(4, 32, grid="mxfp4"), True, True),
        (Scheme(4, activations=Activations(grid="fp8")), True, True),
        (NV, False, True),
        (replace(NV, activations=Activations(dynamic=False)), False, True),
        (MX8, False, True),
        (BLOCKS, False, True),
        (replace(BLOCKS, activations=None), False, False),
        (Scheme(4, 64, grid="nf4"), False, False),
        (Scheme(4, 32, False), False, False),
    ):
        assert (formats.experts_refusal(scheme) is None, formats.served_refusal(scheme) is None) == (stock, served)
        assert for_servers([expert("up", scheme)]) is not stock and not for_servers([item("x.0.mlp.up", scheme=scheme)])


def test_beside_other_weights_llmq_does_not_read_them(tmp_path: Path) -> None:
    assert loader({NV}).code == "llmq" and loader({NV, Scheme(4, 32)}).code is None
    section = guarded(config_of({NV: ["experts.0.up"], Scheme(4, 32): ["q"]}, []))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": section}))
    refused(lambda: llmq.load(tmp_path), str(tmp_path), "has experts that transformers would read wrong", "only vLLM")


def test_blocks_that_a_part_of_a_fused_matrix_does_not_fill() -> None:
    """vLLM allows it of the last part of a dense layer."""

    def parts(*rows: int) -> list[WeightPlan]:
        return [item(f"x.0.attn.{n}", (r, 128), BLOCKS) for n, r in zip("qkv", rows, strict=True)]

    assert not uneven(parts(256, 128, 64)) and not uneven([item("x.0.mlp.down", (64, 128), BLOCKS)])
    assert [found.name for found in uneven(parts(192, 64, 64))] == ["x.0.attn.q", "x.0.attn.k"]
    assert not uneven([replace(part, scheme=Scheme(8, None, grid="fp8")) for part in parts(192, 64, 64)])
    assert len(uneven([expert("gate", BLOCKS, 192), expert("up", BLOCKS, 192)])) == 2
    for other in ("any", "transformers", "llmq"):
        check_served(parts(192, 64, 64), recipe(BLOCKS, loader=other))
    told = "x.0.attn.q (and 1 more): vLLM makes one matrix", "192 outputs", "blocks of 128", "--grid fp8", "--keep"
    refused(lambda: check_served(parts(192, 64, 64), recipe(BLOCKS, loader="vllm")), *told)


def test_what_vllm_refuses_is_refused_for_it() -> None:
    four = Scheme(4, 64, grid="nf4")
    for scheme, told in ((four, "nf4 g64"), (replace(BLOCKS, activations=None), "fp8 block"), (MX6, "mxfp6")):
        items = [item("x.0.a", scheme=scheme)]
        refused(lambda items=items: check_served(items, recipe(four, loader="vllm")), "does not load", told)  # type: ignore[misc]
        check_served(items, recipe(four))
    check_served([item("x.0.a", scheme=Scheme()), item("x.0.b", reason=BY_USER)], recipe(Scheme(), loader="vllm"))
