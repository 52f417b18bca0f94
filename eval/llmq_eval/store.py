"""Find the results for the arguments of `llmq compare`: files, folders of results, or models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llmq.errors import LlmqError
from llmq_eval.results import Results
from llmq_eval.subject import Subject


def collect(given: Sequence[str], out: Path, note: Callable[[str], None] = lambda _: None) -> list[Results]:
    """The named results, and those of their base if they are in the same folder; each model once.

    given: a results file, a folder with results (the --out of `llmq eval`, or its results/), a model's folder, a hub id
    or 'demo'. out: the folder with the results of models. note: is called for files in folders that cannot be read and
    are skipped. Raises LlmqError if an argument has no results, or a named file cannot be read.
    """
    folders = _Folders(note)
    found: dict[tuple[str, str], Results] = {}
    beside: list[Path] = []
    for name in given:
        for file, one in _named(name, out, folders):
            # If a folder was changed between two measurements, both results, if named, count as two models.
            found.setdefault((one.model, one.fingerprint), one)
            beside.append(file.parent)
    for one in list(found.values()):
        if one.base and all(one.base != model for model, _ in found):
            base = next((base for folder in dict.fromkeys(beside) for base in folders.of(one.base, folder)), None)
            if base is not None:
                found[base.model, base.fingerprint] = base
    return list(found.values())


def newest(label: str, out: Path) -> Results | None:
    """The newest results of a model (its label, as in `Results.model`) under `out`, or None."""
    return next(iter(_Folders(lambda _: None).of(label, out / "results")), None)


class _Folders:
    """Folders of results, each read once; note: is called for files that cannot be read."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.known: dict[Path, list[tuple[Path, Results]]] = {}

    def read(self, folder: Path) -> list[tuple[Path, Results]]:
        """The results in a folder, the newest first."""
        if folder not in self.known:
            self.known[folder] = []
            for file in sorted(folder.glob("*.json"), key=lambda file: -file.stat().st_mtime):
                try:
                    self.known[folder].append((file, Results.load(file)))
                except LlmqError as error:
                    self.note(f"skipped: {error}")
        return self.known[folder]

    def of(self, label: str, folder: Path) -> list[Results]:
        """The results of a model in a folder."""
        return [one for _, one in self.read(folder) if one.model == label]


def _named(name: str, out: Path, folders: _Folders) -> list[tuple[Path, Results]]:
    path = Path(name).expanduser()
    if path.is_file():
        return [(path, Results.load(path))]
    if path.is_dir() and not (path / "config.json").is_file():
        for folder in (path / "results", path):
            if found := folders.read(folder):
                newest: dict[str, tuple[Path, Results]] = {}
                for file, one in found:
                    newest.setdefault(one.model, (file, one))
                return list(newest.values())
        raise LlmqError(f"{name} holds no results: give the --out of `llmq eval`, or a model's folder")
    if not path.exists() and name.endswith(".json"):
        raise LlmqError(f"{name}: no such file")
    known = folders.read(out / "results")
    if not path.exists():
        # Results can be compared even if the folder was deleted, and without downloading a hub id.
        gone = [pair for pair in known if pair[1].model in (name, str(path.absolute()))]
        if gone:
            return gone[:1]
    subject = Subject.of(name)
    there = [pair for pair in known if pair[1].model == subject.label]
    # First results of this path; a moved folder is recognized by its files.
    current = [pair for pair in (*there, *known) if pair[1].fingerprint.startswith(subject.fingerprint)]
    if current:
        if current[0][1].model != subject.label:
            folders.note(f"{name} has the files, and so the numbers, of {current[0][1].model}")
        return current[:1]
    if there:
        raise LlmqError(
            f"{name} has changed since it was measured, or another version of llmq or torch measured it: run "
            f"`llmq eval {name}` again, or name its file in {out / 'results'}"
        )
    raise LlmqError(f"{name} has no results in {out}: run `llmq eval {name}` first, or give its --out")
