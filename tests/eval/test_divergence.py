"""Divergence against a computation of its own, against itself, and in the order of the bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmq.errors import LlmqError
from llmq.inference.pretrained import load_model
from llmq_eval import divergence
from llmq_eval.evaluation import evaluate
from llmq_eval.options import Options
from llmq_eval.results import Results
from llmq_eval.windows import Windows, cut
from tests.conftest import Run, write_tiny_model

TASK = "divergence:words.txt"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one tokenizer, the second with weights that are a little off."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("pair")
    base, other = write_tiny_model(folder / "base"), write_tiny_model(folder / "other")
    torch.manual_seed(1)
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    return base, other


def by_hand(base: Path, other: Path, windows: Windows) -> np.ndarray:
    """KL, same top token, lost, gained for every position, one at a time by numpy: [windows, positions, 4]."""
    from transformers import AutoModelForCausalLM

    rows = []
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, other)]
    for ids in windows.ids:
        with torch.inference_mode():
            first, second = (model(ids[None]).logits[0].double().numpy() for model in models)
        row = []
        for i, target in enumerate(ids[1:].tolist()):
            p, q = (np.exp(x[i] - x[i].max()) / np.exp(x[i] - x[i].max()).sum() for x in (first, second))
            was, now = int(p.argmax()), int(q.argmax())
            kl = float((p * np.log(p / q)).sum())
            row.append([kl, was == now, was == target != now, now == target != was])
        rows.append(row)
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize("on_disk", [False, True])
def test_by_hand(pair: tuple[Path, Path], text_file: Path, tmp_path: Path, on_disk: bool) -> None:
    base, other = pair
    windows = cut([base, other], str(text_file), window=32, max_windows=5, progress=False)
    expected = by_hand(base, other, windows)
    model = load_model(other)
    if on_disk:
        with divergence.stored(
            lambda: load_model(base), windows, batch=2, device="cpu", folder=tmp_path, progress=False
        ) as of:
            found = divergence.measure(of, model, other, windows, batch=2, progress=False)
        assert not list(tmp_path.iterdir())
    else:
        of = divergence.loaded(load_model(base), windows, "cpu")
        found = divergence.measure(of, model, other, windows, batch=2, progress=False)
    for column, samples in enumerate((found.kl, found.top1, found.lost, found.gained)):
        assert samples == pytest.approx(expected[:, :, column].mean(1).tolist(), rel=1e-4, abs=1e-9)
    assert found.quantiles == pytest.approx(np.quantile(expected[:, :, 0], (0.5, 0.9, 0.99, 1)).tolist(), rel=1e-3)
    assert found.kl[0] > 0 and expected[:, :, 2].sum() > 0


@pytest.mark.slow
def test_against_itself_and_in_the_order_of_the_bits(tmp_path: Path, llmq: Run) -> None:
    folders = [tmp_path / f"w{bits}" for bits in (8, 4, 3, 2)]
    for folder in folders:
        done = llmq("quantize", "demo", "-o", folder, "--method", "rtn", "--bits", folder.name[1:], "--group-size", 64)
        assert done.returncode == 0, done.stderr
    options = Options(tasks=("divergence",), window=128, max_windows=4, out=tmp_path / "out", progress=False)
    itself, *others = evaluate(["demo", *map(str, folders)], "demo", options)
    task = "divergence:demo"
    assert [measure.value for measure in itself.measures if "top1" not in measure.metric] == [0.0] * 7
    top = itself.find(task, "top1")
    assert top is not None and top.value == 1.0
    kl = [one.find(task, "kl").value for one in others]  # type: ignore[union-attr]
    top1 = [one.find(task, "top1").value for one in others]  # type: ignore[union-attr]
    assert kl[0] > 0 and kl == sorted(kl)
    assert top1[1] < 1 and top1 == sorted(top1, reverse=True)


def test_other_vocabularies_are_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(264)
    model.save_pretrained(tmp_path / "wider")
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / "wider" / file.name).write_bytes(file.read_bytes())
    options = Options(tasks=("divergence",), text=str(text_file), max_windows=1, out=tmp_path, progress=False)
    with pytest.raises(LlmqError, match="264 tokens in its vocabulary and its base 256"):
        evaluate([str(tmp_path / "wider")], str(tiny_model), options)


def test_a_base_is_needed(tiny_model: Path, llmq: Run) -> None:
    done = llmq("eval", tiny_model, "--tasks", "divergence")
    assert done.returncode == 2 and "give it as --base" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_on_disk_where_both_do_not_fit(
    pair: tuple[Path, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = map(str, pair)
    told: list[str] = []

    def run(out: Path) -> list[float]:
        options = Options(tasks=("divergence",), text=str(text_file), window=32, max_windows=3, out=out, progress=False)
        found = evaluate([other], base, options, told.append)[-1].find(TASK, "kl")
        assert found is not None and found.samples
        return found.samples

    both = run(tmp_path / "a")
    assert not told
    monkeypatch.setattr("llmq_eval.models.ROOM", 0.0)
    assert run(tmp_path / "b") == both
    assert any("do not fit" in line for line in told)
    assert json.loads(next((tmp_path / "b" / "results").glob("other*")).read_text())["model"] == other


@pytest.mark.slow
def test_another_base_stands_beside_the_first(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    base, other = map(str, pair)
    options = Options(
        tasks=("divergence",), text=str(text_file), window=32, max_windows=3, out=tmp_path, progress=False
    )
    for of in (base, other):
        evaluate([other], of, options)
    kept = Results.load(evaluate([other], base, options)[-1].path(tmp_path))
    kl = {measure.base: measure.value for measure in kept.measures if measure.metric == "kl"}
    assert set(kl) == {base, other} and kl[base] > 0 == kl[other]
    # The base by another path is the same base.
    shutil.copytree(base, tmp_path / "copy")
    (*_, found) = evaluate([other], str(tmp_path / "copy"), options)
    assert found.measures[0].key in [measure.key for measure in kept.measures]
    assert found.measures[0].base == str(tmp_path / "copy")


@pytest.mark.slow
def test_the_protocol_names_both_dtypes(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, other = pair
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16).save_pretrained(half)
    for file in base.glob("tokenizer*"):
        (half / file.name).write_bytes(file.read_bytes())
    options = Options(
        tasks=("divergence",), text=str(text_file), window=32, max_windows=2, out=tmp_path, progress=False
    )
    (*_, found) = evaluate([str(half)], str(base), replace(options, dtype="auto"))
    assert "in float32 and in bfloat16, logits" in found.measures[0].protocol
    (*_, found) = evaluate([str(half), f"{half}/."], str(base), options)
    assert "both in float32, logits" in found.measures[0].protocol
    assert len(evaluate([str(half), f"{half}/."], None, replace(options, tasks=("perplexity",)))) == 1
