"""Models that do not fit: refused before hours go by, or measured from the disk to the same numbers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmq.errors import LlmqError
from llmq.formats import fp8, mxfp4
from llmq_eval import models
from llmq_eval.evaluation import evaluate
from llmq_eval.options import Options
from llmq_eval.results import Measure
from llmq_eval.subject import Subject
from llmq_eval.tasks import installed
from tests.conftest import Run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with less memory than the demo model takes in float32, 12.5 MiB."""
    found = SimpleNamespace(**psutil.virtual_memory()._asdict() | {"available": 8 << 20})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def numbers(device: str, out: Path, data: Path) -> list[list[Measure]]:
    """Perplexity, divergence, and log likelihoods by lm-eval, of the demo model against itself."""
    tasks = ("perplexity", "divergence", *(["piqa"] if installed() else []))
    options = Options(
        tasks=tasks, window=64, max_windows=3, device=device, out=out, progress=False, data_dir=data
    )  # fmt: skip
    return [one.measures for one in evaluate(["demo"], "demo", options)]


@pytest.mark.slow
def test_refused_with_the_ways_out(small: None, tmp_path: Path, llmq: Run) -> None:
    done = llmq("eval", "demo", "--max-windows", 1, "--out", tmp_path)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "demo: its weights take 12.5 MiB of memory, and 8.0 MiB are free on cpu" in said
    assert "--dtype bfloat16 takes half" in said and "--device auto" in said
    assert llmq("eval", "demo", "--max-windows", 1, "--out", tmp_path, "--dtype", "bfloat16").returncode == 0
    done = llmq("eval", "demo", "--tasks", "speed", "--out", tmp_path)
    assert done.returncode == 2 and "12.5 MiB" in done.stderr


@pytest.mark.slow
def test_from_the_disk(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    row = '{"goal": "count to three", "sol1": "one two three", "sol2": "seven", "label": 0}\n'
    (data / "piqa_validation.jsonl").write_text(row * 4)
    placed = []
    real = models.Models.load

    def load(self: models.Models, subject: Subject) -> object:
        model = real(self, subject)
        placed.append(set(getattr(model, "hf_device_map", {}).values()))
        return model

    monkeypatch.setattr(models.Models, "load", load)
    found = numbers("auto", tmp_path / "a", data)
    assert placed and all("disk" in places for places in placed)
    monkeypatch.undo()
    assert found == numbers("cpu", tmp_path / "b", data)


@pytest.mark.slow
def test_what_is_made_dense_must_fit(small: None, tmp_path: Path, llmq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert llmq("quantize", "demo", "-o", tmp_path / "w4", "--method", "rtn", "--group-size", 64).returncode == 0
    found = SimpleNamespace(**psutil.virtual_memory()._asdict() | {"available": 6 << 20})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    command = ("eval", tmp_path / "w4", "--max-windows", 1, "--out", tmp_path / "out", "--device", "auto")
    done = llmq(*command)
    assert done.returncode == 2 and "--kernels keeps its weights packed" in " ".join(done.stderr.split())
    assert llmq(*command, "--kernels").returncode == 0


MB = 1 << 20


@pytest.mark.parametrize(
    ("weights", "quantized", "options", "fits"),
    [
        ((3 * MB, 6 * MB, 16.0), "", {}, False),
        ((3 * MB, 6 * MB, 16.0), "", {"dtype": "bfloat16"}, True),
        ((3 * MB, 12 * MB, 32.0), "", {"dtype": "auto"}, False),  # in its own dtype it is as large as its file
        ((6 * MB, 6 * MB, 0.0), "", {}, True),  # no safetensors: the file may hold float32
        ((9 * MB, 5 * MB, 4.2), "compressed-tensors", {}, False),  # stock makes it dense
        ((9 * MB, 5 * MB, 4.2), "compressed-tensors", {"device": "auto"}, False),
        ((9 * MB, 5 * MB, 4.2), "compressed-tensors", {"kernels": True}, True),
        ((9 * MB, 5 * MB, 4.2), "bitsandbytes", {}, True),
        ((9 * MB, 18 * MB, 16.0), "", {"device": "auto"}, True),
    ],
)
def test_what_is_taken_to_fit(
    weights: tuple[int, int, float],
    quantized: str,
    options: dict[str, Any],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 8 MiB: numbers in all weights, bytes on disk, bits per weight (0 where not known)."""
    monkeypatch.setattr(models, "free_memory", lambda _: 8 * MB)
    subject: Any = SimpleNamespace(given="m", label="m", weights=weights, quantized=quantized)
    with contextlib.nullcontext() if fits else pytest.raises(LlmqError, match="8.0 MiB are free"):
        models.Models(Options(**options)).check(subject)


@pytest.mark.parametrize("method", ["fp8", "modelopt", "mxfp4"])
@pytest.mark.parametrize("kernels", [False, True])
def test_what_only_loads_dense_must_fit_as_such(method: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU. No kernel of ours reads these, so none is offered."""
    for module in (fp8, mxfp4):
        monkeypatch.setattr(module, "STOCK_UNPACKS", True)
    monkeypatch.setattr(models, "free_memory", lambda _: 8 * MB)
    subject: Any = SimpleNamespace(given="m", label="m", weights=(9 * MB, 5 * MB, 4.2), quantized=method)
    with pytest.raises(LlmqError, match="8.0 MiB are free") as caught:
        models.Models(Options(kernels=kernels)).check(subject)
    assert "--kernels" not in str(caught.value)
