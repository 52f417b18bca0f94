"""Evaluation on llmq's operators: folders of other tools measured packed, with the numbers of their dense weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.inference.pretrained import load_model
from llmq_eval import speed
from llmq_eval.evaluation import evaluate
from llmq_eval.options import Options
from tests.conftest import Run, write_tokenizer
from tests.llmq.packed_mixtures import mixture, standard
from tests.llmq.written import Case, write


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Weights rounded by GPTQ and AWQ: packed, and the first of them dense."""
    made = [tmp_path / name for name in ("dense", "gptq", "awq")]
    for folder in made[1:]:
        dense = write(folder, Case(folder.name, 4, 32 if folder.name == "gptq" else 64, True))
        if folder.name == "gptq":
            dense.save_pretrained(made[0])
    for folder in made:
        write_tokenizer(folder)
    return made


@pytest.mark.slow
def test_the_numbers_of_dense_weights(folders: list[Path], text_file: Path, tmp_path: Path) -> None:
    options = Options(
        tasks=("perplexity", "divergence"), text=str(text_file), window=32, max_windows=4, kernels=True,
        out=tmp_path / "out", progress=False,
    )  # fmt: skip
    base, gptq, awq = evaluate([str(folder) for folder in folders], str(folders[0]), options)
    task, name = "perplexity:words.txt", "divergence:words.txt"
    same, other = (one.find(name, "kl") for one in (gptq, awq))
    assert same and other and same.value < 1e-9 < 1e-3 < other.value
    mine, dense = (one.find(task, "perplexity") for one in (gptq, base))
    assert mine and dense and mine.value == pytest.approx(dense.value, rel=1e-6)
    assert mine.protocol == dense.protocol and "float32 on llmq's kernels" in mine.protocol


@pytest.mark.slow
def test_a_mixture_with_packed_experts(text_file: Path, tmp_path: Path) -> None:
    """Also where another tool gave its experts names that stock transformers fills with random numbers."""
    mixture(tmp_path, "mixtral", Case("ct"), standard)
    for name in ("dense", "packed"):
        write_tokenizer(tmp_path / name)
    options = Options(
        tasks=("perplexity", "divergence"), text=str(text_file), window=32, max_windows=4, kernels=True,
        out=tmp_path / "out", progress=False,
    )  # fmt: skip
    base, packed = evaluate([str(tmp_path / "packed")], str(tmp_path / "dense"), options)
    task, name = "perplexity:words.txt", "divergence:words.txt"
    wanted, found, kl = base.find(task, "perplexity"), packed.find(task, "perplexity"), packed.find(name, "kl")
    assert wanted and found and found.value == pytest.approx(wanted.value, rel=1e-5)
    assert kl and kl.value < 1e-9 and "float32 on llmq's kernels" in found.protocol


@pytest.mark.slow
def test_without_them_another_package_is_needed(folders: list[Path], text_file: Path, llmq: Run) -> None:
    command = ("eval", folders[1], "--text", text_file, "--window", 32, "--max-windows", 2)
    done = llmq(*command)
    assert done.returncode == 2 and "gptqmodel; `llmq eval --kernels` needs no other" in " ".join(done.stderr.split())
    done = llmq(*command, "--kernels")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_speed_of_packed_weights(folders: list[Path]) -> None:
    found = speed.measure(folders[1], dtype="float32", repeats=1, prompt=8, tokens=4, kernels=True)
    assert found.dtype == "float32 on llmq's kernels" and min(found.prefill + found.decode) > 0


@pytest.mark.slow
def test_asked_for_in_float32_it_runs_in_it(tmp_path: Path, llmq: Run) -> None:
    """Also what stock's reader of bitsandbytes leaves in bfloat16: else it would be in no line with its base."""
    folder = tmp_path / "nf4"
    assert llmq("quantize", "demo", "-o", folder, "--method", "nf4").returncode == 0
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    options = Options(window=64, max_windows=2, out=tmp_path / "out", progress=False)
    base, nf4 = (one.measures[0] for one in evaluate([str(folder)], "demo", options))
    assert base.protocol == nf4.protocol and "float32" in nf4.protocol
    assert nf4.value == pytest.approx(base.value, rel=0.05) and nf4.value != base.value
