"""Several ranks measure what one process does, digit for digit, and one of them writes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import llmq
from llmq import ranks
from llmq.errors import LlmqError
from llmq.recipe.recipe import Recipe
from llmq_eval import divergence, models, processes, tasks
from llmq_eval.evaluation import evaluate
from llmq_eval.journal import Journal
from llmq_eval.options import Options
from llmq_eval.subject import Subject
from tests.conftest import write_tokenizer
from tests.llmq import mixtures
from tests.together import together

needs_lm_eval = pytest.mark.skipif(not tasks.installed(), reason="lm-eval is not installed: pip install 'llmq[eval]'")


@pytest.fixture(autouse=True)
def as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--ranks` and torchrun say it to each rank; without, accelerate takes all of a machine's cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def written(out: Path) -> dict[str, str]:
    """Every file under `out` but for locks, and the time in which a task file was made."""
    files = (file for file in out.rglob("*.json*") if file.is_file())
    return {str(file.relative_to(out)): file.read_text() for file in files}


def work(models: list[Path], base: Path | str, **options: Any) -> Callable[[], list[str]]:
    """An evaluation, as each rank calls it: what it is told of its results, and the notes."""

    def run() -> list[str]:
        notes: list[str] = []
        found = evaluate([str(model) for model in models], str(base), Options(progress=False, **options), notes.append)
        return [*(one.to_json() for one in found), *notes]

    return run


@pytest.mark.slow
def test_windows_of_dense_and_quantized_models(tmp_path: Path, tiny_model: Path, text_file: Path) -> None:
    """compressed-tensors, of stacked experts too, unpacks on all ranks together while it loads."""
    base = mixtures.write("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    write_tokenizer(base)
    chosen = Recipe.from_dict({"methods": "rtn", "scheme": {"group_size": 16}}, "recipe")
    for source, out in ((base, tmp_path / "experts-w4"), (tiny_model, tmp_path / "tiny-w4")):
        llmq.quantize(str(source), out, chosen)
    common: dict[str, Any] = {"text": str(text_file), "window": 32, "max_windows": 7, "batch": 2}
    common |= {"tasks": ("perplexity", "divergence")}
    for source, quantized in ((base, "experts-w4"), (tiny_model, "tiny-w4")):
        one, several = tmp_path / f"one-{quantized}", tmp_path / f"several-{quantized}"
        whole = work([tmp_path / quantized], source, out=one, **common)()
        found = together(3, work([tmp_path / quantized], source, out=several, **common))
        assert found == [whole] * 3
        assert written(several) == written(one) and len(written(one)) == 5


@pytest.mark.slow
def test_a_rank_is_killed_and_one_process_goes_on(
    tmp_path: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"text": str(text_file), "window": 32, "max_windows": 12, "tasks": ("divergence",)}
    broken = work([tiny_model], tiny_model, out=tmp_path / "broken", **common)
    whole = work([tiny_model], tiny_model, out=tmp_path / "whole", **common)()
    real = Journal.add

    def add(self: Journal, pieces: dict[str, Any]) -> None:
        real(self, pieces)
        if ranks.rank() == 1 and "4" in pieces:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Journal, "add", add)
    lost, killed, _ = together(3, broken)
    assert isinstance(lost, ranks.Lost) and killed is None
    monkeypatch.undo()
    kept = {file.name.split(".", 1)[1] for file in (tmp_path / "broken" / "cache").iterdir()}
    assert {name.rpartition("journal")[0].rpartition("txt-")[2][17:] for name in kept} == {"", "1.", "2."}
    # Windows of each rank: four of the first and of the last, two of the one that was killed.
    *found, note = broken()
    assert "resuming after 10 finished pieces" in note and found == whole
    assert written(tmp_path / "broken") == written(tmp_path / "whole")
    assert not list((tmp_path / "broken" / "cache").glob("*.journal"))
    (*_, note), others = together(2, broken)
    assert "measured before" in note and others == found == whole


@pytest.mark.slow
def test_models_that_do_not_fit_together(
    tmp_path: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank stores the base's log-probabilities of its own windows."""
    common: dict[str, Any] = {"text": str(text_file), "window": 32, "max_windows": 5, "tasks": ("divergence",)}
    whole = work([tiny_model], tiny_model, out=tmp_path / "one", **common)()
    sizes: list[int] = []
    monkeypatch.setattr(models.Models, "fit", lambda *_: False)
    monkeypatch.setattr(divergence, "_check_disk", lambda needed, _: sizes.append(needed))

    def run() -> tuple[list[str], list[int]]:
        return work([tiny_model], tiny_model, out=tmp_path / "several", **common)(), sizes

    found = together(2, run)
    assert [told[0] for told, _ in found] == whole * 2
    assert [needed for _, needed in found] == [[8 * 3 * 2 * 31 * 256], [8 * 2 * 2 * 31 * 256]]


@needs_lm_eval
@pytest.mark.slow
def test_tasks(tmp_path: Path) -> None:
    """Also with examples drawn at random, and with fewer documents than ranks."""
    data = tmp_path / "data"
    data.mkdir()
    goals = [
        {"goal": f"count to {i}", "sol1": "one two " * (1 + i % 3), "sol2": "three", "label": i % 2} for i in range(7)
    ]
    questions = [{"question": f"what is {i}?", "choices": ["one", "two or three"], "answer": i} for i in range(2)]
    for name, rows in (("piqa_validation", goals), ("arc_easy_test", questions)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {"data_dir": data, "tasks": ("piqa", "arc_easy")}
    common |= {"settings": tasks.Settings(fewshot=1)}
    one, several = tmp_path / "one", tmp_path / "several"
    whole = work([Path("demo")], "demo", out=one, **common)()
    assert together(3, work([Path("demo")], "demo", out=several, **common)) == [whole] * 3
    assert written(several / "results") == written(one / "results")
    common["settings"] = tasks.Settings(batch=4)
    (told, *_), _ = together(2, work([Path("demo")], "demo", out=several, **common))
    assert "float32, batch 4 on each of 2 ranks" in told


def test_requests_are_dealt_by_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one document stay together; each of many short tasks begins with another rank."""
    places = [("a", 0), ("a", 0), ("a", 1), ("b", 0), ("b", 0), ("c", 0)]
    requests = [SimpleNamespace(task_name=name, doc_id=number) for name, number in places]
    assert tasks.dealt(requests) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(ranks, "size", lambda: 2)
    assert tasks.dealt(requests) == [0, 1, 3, 4]
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert tasks.dealt(requests) == [2, 5]


def test_what_one_process_measures_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    def refusals() -> list[LlmqError]:
        found = []
        for options in ({"tasks": ("memory",)}, {"device": "auto"}, {"device": "cuda:1"}):
            with pytest.raises(ranks.Common) as told:
                work([tiny_model], tiny_model, out=tmp_path, **options)()
            found.append(told.value)
        return found

    for timed, spread, numbered in together(2, refusals):
        assert "memory is measured by one process" in str(timed)
        assert "--device auto with several ranks" in str(spread) and "--device cuda:1" in str(numbered)


def test_all_ranks_copies_must_fit(tmp_path: Path, tiny_model: Path, text_file: Path, monkeypatch: Any) -> None:
    """What is free is shared by the ranks of a machine, and they agree on it."""
    needed = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    available = int(needed * 1.5)
    found = SimpleNamespace(**psutil.virtual_memory()._asdict() | {"available": available})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    common: dict[str, Any] = {"text": str(text_file), "window": 32, "max_windows": 2, "out": tmp_path}
    for told in together(2, work([tiny_model], tiny_model, **common)):
        assert isinstance(told, ranks.Common) and "free on cpu for each rank: " in str(told)
        assert "fewer ranks have more memory each" in str(told)
    assert work([tiny_model], tiny_model, **common)()


@needs_lm_eval
def test_what_only_one_rank_fails_by_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before tasks are read, which rank 0 tells the others of."""
    real = Subject.of

    def of(name: str, **options: Any) -> Subject:
        if ranks.rank() == 1:
            raise LlmqError("the hub did not answer")
        return real(name, **options)

    monkeypatch.setattr(Subject, "of", of)
    found = together(2, work([Path("demo")], "demo", out=tmp_path, tasks=("piqa",)))
    assert all(isinstance(one, ranks.Common) and "the hub did not answer" in str(one) for one in found)


def test_ranks_with_other_models_are_refused(tmp_path: Path, tiny_model: Path, text_file: Path) -> None:
    """As on machines whose folders of one name differ."""

    def run() -> object:
        if ranks.rank() == 1:
            folder = tmp_path / "other"
            shutil.copytree(tiny_model, folder)
            os.chdir(folder)
            with Path("config.json").open("a") as file:
                file.write(" ")
        else:
            os.chdir(tiny_model)
        return work([Path(".")], ".", out=tmp_path / "out", text=str(text_file), window=32, max_windows=2)()

    assert all(isinstance(one, ranks.Common) and "another model" in str(one) for one in together(2, run))


def test_a_device_that_a_rank_does_not_have_is_told_before_ranks_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "own_device", lambda device: "cuda:99")
    with pytest.raises(LlmqError, match="cuda:99"):
        processes.connect("cuda")


def test_why_ranks_do_not_meet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> object:
        raise RuntimeError("the address is already in use")

    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr("accelerate.PartialState", refuses)
    with pytest.raises(LlmqError, match="the ranks do not find each other: the address is already in use") as told:
        processes.connect("cpu")
    assert not isinstance(told.value, ranks.Lost)


def test_what_only_rank_0_fails_by_ends_all() -> None:
    def fails() -> str:
        def make() -> str:
            if ranks.first():
                raise LlmqError("the data are damaged")
            return "made"

        return processes.first_alone(make)

    found = together(2, fails)
    assert all(isinstance(one, ranks.Common) and str(one) == "the data are damaged" for one in found)
    assert together(2, lambda: processes.first_alone(ranks.rank)) == [0, 1]
