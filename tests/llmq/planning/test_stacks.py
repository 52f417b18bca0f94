"""Experts that are stored in one tensor: planned one by one with --loader llmq, refused or whole without."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llmq
from llmq import job
from llmq.checkpoint.sink import Sink
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.planning import experts
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.mixtures import W4
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32, seed=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts stored as [experts, out, in]; do not change it."""
    return mixtures.write("granitemoe", tmp_path_factory.mktemp("models") / "rows", num_hidden_layers=2)


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts stored as [experts, in, out], with square matrices among them; do not change it."""
    return mixtures.write("gpt_oss", tmp_path_factory.mktemp("models") / "columns")


def plan(model: Path, scheme: Scheme = W4, **more: Any) -> Plan:
    return job.plan(str(model), Recipe(methods=("rtn",), scheme=scheme, loader="llmq", **more), ids=IDS)


def test_every_experts_matrix_is_planned_with_its_shape(rows: Path, columns: Path) -> None:
    for model, mark in ((rows, ""), (columns, ".T")):
        made = plan(model)
        stacks = {n: t for n, t in mixtures.load(model)[0].named_parameters() if t.dim() == 3}
        mine = {i.name: i for i in made.weights if i.expert is not None}
        wanted = {}
        for name, stack in stacks.items():
            owner, _, last = name.rpartition(".")
            shape = stack.shape[:0:-1] if mark else stack.shape[1:]
            wanted |= {f"{owner}.{e}.{last}{mark}": (tuple(shape), e) for e in range(len(stack))}
        assert {n: (i.shape, i.expert) for n, i in mine.items()} == wanted
        assert all(i.row_parallel is ("down_proj" in n) for n, i in mine.items())
        assert made.for_llmq_alone
        assert [loader.code for loader in made.loaders] == ["llmq"]


@pytest.mark.parametrize("pattern", ["experts", "block_sparse_moe", "re:(input|output)_linear$"])
def test_other_weights_of_such_a_model_alone_are_for_everyone(pattern: str, rows: Path) -> None:
    """Kept by the names in the checkpoint, or by those that experts would have."""
    made = plan(rows, keep=(pattern,))
    assert not made.for_llmq_alone and "transformers" in {loader.code for loader in made.loaders}
    assert {i.tensor for i in made.weights if len(i.shape) == 3 and i.by_user} == {
        n for n, t in mixtures.stored(rows).items() if t.dim() == 3
    }


def test_experts_stored_singly_are_for_everyone_with_any_loader(tmp_path: Path) -> None:
    made = plan(mixtures.write("qwen3_moe", tmp_path / "m", num_hidden_layers=2))
    assert any(i.expert is not None and i.scheme is not None for i in made.weights)
    assert not made.for_llmq_alone


def test_schemes_that_llmq_does_not_keep_packed_are_refused(rows: Path, columns: Path) -> None:
    for model in (rows, columns):
        refused(partial(plan, model, Scheme(8, None, grid="fp8")), "use --grid int, mxfp4 or nvfp4, or --keep experts")
        refused(partial(plan, model, Scheme(4, 32, grid="nf4")), "use --grid int, or --keep experts")
        several = partial(plan, model, overrides=(("re:experts\\.2\\.", Scheme(8, 16)),))
        refused(several, "experts with different schemes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [Scheme(2, 16), Scheme(3, 16), Scheme(4, 16, symmetric=False), Scheme(8, None)], ids=str
)
def test_schemes_that_stock_could_not_read_are_loaded(
    scheme: Scheme, rows: Path, columns: Path, tmp_path: Path
) -> None:
    for model in (rows, columns):
        out = tmp_path / model.name
        report = job.quantize(str(model), out, Recipe(methods=("rtn",), scheme=scheme, loader="llmq"), ids=IDS)
        section = json.loads((out / "config.json").read_text())["quantization_config"]
        assert section["format"].startswith("llmq-")
        twin, _ = mixtures.load(model)
        state = twin.state_dict()
        mixtures.put_quantized(state, report, mixtures.stored(out))
        loaded = llmq.load(out, dtype="float32", device_map="cpu")
        assert not [n for n, p in loaded.named_parameters() if p.dim() == 3]
        assert torch.allclose(mixtures.logits(loaded), mixtures.logits(twin), atol=1e-5)
        with pytest.raises(ValueError, match="format"):
            mixtures.load(out)


@pytest.mark.slow
def test_transposed_stacks_with_biases_run_eager_and_compiled_whole(columns: Path, tmp_path: Path) -> None:
    job.quantize(str(columns), tmp_path / "out", Recipe(methods=("rtn",), scheme=W4, loader="llmq"), ids=IDS)
    loaded = llmq.load(tmp_path / "out", dtype="float32", device_map="cpu")
    wanted = mixtures.logits(loaded)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")(tiny.tokens(), use_cache=False).logits
    loaded.set_experts_implementation("eager")
    for found in (compiled, mixtures.logits(loaded)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_checkpoint_of_stacks_of_a_type_that_stores_experts_singly(kind: str, tmp_path: Path) -> None:
    """transformers' rules for the type match some of the names, too."""
    model, _ = mixtures.load(mixtures.write(kind, tmp_path / "m"))
    shutil.copytree(tmp_path / "m", stacked := tmp_path / "s", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, stacked / "model.safetensors")
    report = job.quantize(str(stacked), tmp_path / "out", Recipe(methods=("rtn",), scheme=W4, loader="llmq"), ids=IDS)
    mixtures.put_quantized(model.state_dict(), report, mixtures.stored(tmp_path / "out"))
    loaded = llmq.load(tmp_path / "out", dtype="float32", device_map="cpu")
    assert not [n for n, p in loaded.named_parameters() if p.dim() == 3]
    assert torch.allclose(mixtures.logits(loaded), mixtures.logits(model), atol=1e-5)


@pytest.mark.slow
def test_a_run_broken_off_between_experts_resumes_with_the_same_bytes(
    columns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "GROUP_EXPERTS", 1)
    wanted = Recipe(methods=("gptq",), scheme=W4, loader="llmq")
    job.quantize(str(columns), tmp_path / "whole", wanted, ids=IDS)
    commit, left = Sink.commit, [3]

    def broken(self: Sink, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        commit(self, *args, **kwargs)

    monkeypatch.setattr(Sink, "commit", broken)
    with pytest.raises(KeyboardInterrupt):
        job.quantize(str(columns), tmp_path / "broken", wanted, ids=IDS)
    monkeypatch.setattr(Sink, "commit", commit)
    job.quantize(str(columns), tmp_path / "broken", wanted, ids=IDS)
    whole, again = mixtures.stored(tmp_path / "whole"), mixtures.stored(tmp_path / "broken")
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)


def test_a_number_that_is_not_finite_is_named_with_its_expert(rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, model := tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = mixtures.stored(rows)
    name = next(n for n, t in tensors.items() if t.dim() == 3)
    tensors[name][2, 1, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmqError, match=rf"{name}\[2\] in .*model.safetensors has nan at \[1, 3\]"):
        job.quantize(str(model), tmp_path / "out", Recipe(methods=("rtn",), scheme=W4, loader="llmq"), ids=IDS)
