"""From what was named on the command line of `llmq compare` to results: files, folders of results, or models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.errors import LlmqError
from llmq_eval.results import Results
from llmq_eval.subject import Subject


def collect(given: Sequence[str], out: Path) -> list[Results]:
    """The results that were named, and those of their base where they are beside them; each model once.

    given: a results file, a folder with results (the --out of `llmq eval`, or its results/), a model's folder, a hub id
    or 'demo'. out: where the results of models are. Raises LlmqError where something has no results.
    """
    found: dict[str, Results] = {}
    beside: list[Path] = []
    for name in given:
        files = _files(name, out)
        for file in files:
            one = Results.load(file)
            found.setdefault(one.model, one)
            beside.append(file.parent)
    for one in list(found.values()):
        if one.base and one.base not in found:
            base = _newest(one.base, dict.fromkeys(beside))
            if base is not None:
                found[base.model] = base
    return list(found.values())


def _files(name: str, out: Path) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not (path / "config.json").is_file():
        for folder in (path / "results", path):
            files = sorted(folder.glob("*.json"), key=lambda file: -file.stat().st_mtime)
            if files:
                return files
        raise LlmqError(f"{name} holds no results: give the --out of `llmq eval`, or a model's folder")
    if not path.exists() and name.endswith(".json"):
        raise LlmqError(f"{name}: no such file")
    subject = Subject.of(name)
    files = _of(subject.label, out / "results")
    current = [file for file in files if Results.load(file).fingerprint.startswith(subject.fingerprint)]
    if current:
        return current[:1]
    if files:
        raise LlmqError(f"{name} has changed since it was measured: run `llmq eval {name}` again")
    raise LlmqError(f"{name} has no results in {out}: run `llmq eval {name}` first, or give its --out")


def _of(label: str, folder: Path) -> list[Path]:
    """The files of a model in a folder of results, the newest first."""
    files = sorted(folder.glob("*.json"), key=lambda file: -file.stat().st_mtime)
    return [file for file in files if Results.load(file).model == label]


def _newest(label: str, folders: dict[Path, None]) -> Results | None:
    return next((Results.load(file) for folder in folders for file in _of(label, folder)), None)
