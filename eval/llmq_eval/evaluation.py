"""One whole evaluation: models × tasks; each task's results are cached by fingerprint, and interrupted tasks resume.

Under `out`: results/ has one file per model; cache/ has each task's measures, keyed by a hash of the model's files, the
protocol and the versions, and the journals of unfinished tasks; tasks/ has the task files made from local data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from llmq import ranks
from llmq.errors import LlmqError
from llmq_eval import divergence, measures, processes, speed, tasks, windows
from llmq_eval.journal import Journal, files
from llmq_eval.models import Models
from llmq_eval.options import Options
from llmq_eval.perplexity import measure as measure_perplexity
from llmq_eval.results import Measure, Results, forget, make_folder, write
from llmq_eval.subject import Subject, check_device, key, machine, versions
from llmq_eval.tasks import OWN, Tasks
from llmq_eval.windows import Windows


def evaluate(
    models: Sequence[str], base: str | None, options: Options, note: Callable[[str], None] = lambda _: None
) -> list[Results]:
    """Measure models and their base by the same protocols; cached measures are not measured again.

    The returned results hold the requested tasks only; the files under `out` also keep earlier measures. The base is
    compared with itself only if `models` names it. note: is called with notes for the user. Of several ranks, all call
    this alike; all get the results, and rank 0 writes them and has the notes. Raises LlmqError for unknown tasks, a
    missing device, models that do not load, or unavailable texts and documents.
    """
    processes.connect(options.device)
    if not ranks.first():
        options, note = replace(options, progress=False), _silent
    with ranks.failing_together():
        made = _Evaluation(models, base, options, note)
    ranks.agree(made.measured(), "model")
    made.read_tasks()
    with ranks.failing_together():
        made.cut_windows()
    return made.run()


def _silent(_: str) -> None:
    return


class _Evaluation:
    def __init__(self, models: Sequence[str], base: str | None, options: Options, note: Callable[[str], None]) -> None:
        processes.check(options.device, [name.partition(":")[0] for name in options.tasks])
        check_device(ranks.own_device(options.device))
        self.options = options
        self.place = processes.own_place(options.device)
        self.note = note
        self.names = list(dict.fromkeys(_whole(name, options.text) for name in options.tasks))
        own = [name for name in self.names if name.partition(":")[0] in OWN]
        self.others = others = [name for name in self.names if name not in own]
        self.tasks: Tasks | None = None
        self.windows: dict[str, Windows] = {}
        for name in own:
            if ":" in name and name.partition(":")[0] in ("speed", "memory"):
                raise LlmqError(f"unknown task {name!r}: {name.partition(':')[0]} takes no text")
        if others:
            tasks.check_installed(others)
        elif options.write_tasks:
            raise LlmqError("--write-tasks writes the task files of lm-eval's tasks: name some with --tasks")
        if options.write_tasks and not options.data_dir:
            raise LlmqError("--write-tasks writes task files for local documents: give their folder as --data-dir")
        if any(name.startswith("divergence") for name in own) and base is None:
            raise LlmqError("divergence is measured against another model, the unquantized one: give it as --base")
        trust = options.trust_remote_code
        if options.cache is not None and (timed := [n for n in own if n.partition(":")[0] in ("speed", "memory")]):
            raise LlmqError(f"--kv-cache simulates a rounded cache: {timed[0]} says nothing of it")
        given = [Subject.of(name, cache=options.cache, trust_remote_code=trust) for name in models]
        # Two names may mean the same model.
        self.subjects = list({subject.label: subject for subject in reversed(given)}.values())[::-1]
        self.base = None if base is None else Subject.of(base, trust_remote_code=trust)
        known = [subject.label for subject in self.subjects]
        self.all = self.subjects if self.base is None or self.base.label in known else [self.base, *self.subjects]

    def measured(self) -> dict[str, str]:
        """The fingerprints of what is measured, which all ranks must have alike, wherever it lies."""
        base = {} if self.base is None else {"the base": self.base.fingerprint}
        return {f"model {number}": subject.fingerprint for number, subject in enumerate(self.all)} | base

    def read_tasks(self) -> None:
        """Find the tasks of lm-eval, and write the files of those with local documents."""
        o, others = self.options, self.others
        include = o.write_tasks or o.out / "tasks" / key(str(o.data_dir))
        if others:
            self.tasks = processes.first_alone(lambda: Tasks(others, o.data_dir, include))

    def cut_windows(self) -> None:
        """Cut the texts."""
        texts = [name for name in self.names if name.partition(":")[0] in ("perplexity", "divergence")]
        self.windows = {name: self._cut(name) for name in texts}

    def _cut(self, task: str) -> Windows:
        """The windows of a task's text, which are the same for every model."""
        o = self.options
        return windows.cut(
            [subject.folder for subject in self.all],
            task.partition(":")[2],
            window=o.window,
            max_windows=o.max_windows,
            special_tokens=o.special_tokens,
            data_dir=o.data_dir,
            kernels=o.kernels,
            trust_remote_code=o.trust_remote_code,
            progress=o.progress,
        )

    def run(self) -> list[Results]:
        done = []
        with Models(self.options, self.note) as models:
            for subject in self.all:
                found = self._start(subject)
                for name in self.names:
                    if name.startswith("divergence") and subject not in self.subjects:
                        continue
                    found = found.with_measures(self._task(subject, name, models))
                    # Saved after each task, so that finished tasks are kept if a later one fails.
                    if ranks.first():
                        found.keep(self.options.out, self.note)
                models.drop(subject)
                done.append(found)
        return done

    def _start(self, subject: Subject) -> Results:
        """Empty results of this model with the current versions."""
        _, nbytes, bits = subject.weights
        used = versions(*(["lm_eval"] if self.tasks else []))
        # The version of lm-eval is part of its tasks' protocols.
        fingerprint = subject.fingerprint + key({n: v for n, v in used.items() if n != "lm_eval"})[:4]
        base = None if self.base is None else self.base.label
        return Results(subject.label, base, nbytes, bits, used, machine(self.options.device), fingerprint)

    def _task(self, subject: Subject, name: str, models: Models) -> list[Measure]:
        kind = name.partition(":")[0]
        place, named = self.options.out / "cache", self._key(subject, name, kind)
        file, journal = place / f"{named}.json", place / f"{named}.journal"
        if self.options.fresh and ranks.first():
            forget(file, *files(journal))
        held = ranks.tell(measures.read(file) if ranks.first() else None)
        if held is not None:
            self.note(f"{subject.given} {name}: measured before, read from {file} (--fresh measures again)")
            # The cached measures may name the same base by another path.
            of = None if self.base is None else self.base.label
            return [replace(measure, base=of) if measure.base else measure for measure in held]
        with Journal(journal) as pieces:
            if pieces.done:
                self.note(f"{subject.given} {name}: resuming after {len(pieces.done)} finished pieces")
            found = self._measure(subject, name, kind, models, pieces)
            if ranks.first():
                write(file, measures.to_json(found))
                pieces.remove()
        return found

    def _key(self, subject: Subject, name: str, kind: str) -> str:
        """A hash of everything that the numbers of a task depend on."""
        o = self.options
        parts: dict[str, Any] = {"model": subject.fingerprint, "task": name, "dtype": o.dtype, "device": o.device}
        if o.kernels:
            parts |= {"kernels": True}
        parts |= {"versions": versions(*(["lm_eval"] if kind not in OWN else []))}
        if name in self.windows:
            ids = self.windows[name].ids
            parts |= {"ids": self.windows[name].digest, "shape": list(ids.shape)}
            parts |= {"batch": o.batch, "protocol": self.windows[name].protocol}
        if kind == "divergence":
            assert self.base is not None
            parts |= {"base": self.base.fingerprint}
        elif kind in ("speed", "memory"):
            parts |= {"machine": machine(o.device), "lengths": [o.repeats, o.prompt, o.tokens]}
        elif self.tasks is not None and kind not in OWN:
            parts |= {"settings": asdict(o.settings), "documents": self.tasks.fingerprint(name)}
            # Which requests are in a batch changes their last digits.
            parts |= {"ranks": ranks.size()} if ranks.size() > 1 and o.settings.batch != 1 else {}
        text = re.sub(r"[^A-Za-z0-9._-]+", "_", name.partition(":")[2])[-30:]
        return "-".join(filter(None, (kind, text, key(parts))))

    def _measure(self, subject: Subject, name: str, kind: str, models: Models, journal: Journal) -> list[Measure]:
        o = self.options
        common: dict[str, Any] = {"batch": o.batch, "device": self.place, "progress": o.progress, "journal": journal}
        if kind in ("speed", "memory"):
            on = machine(o.device)
            place = on.get("gpu", on["cpu"]) + (", spread by device map" if o.device == "auto" else "")
            return measures.speed(kind, self._speed(subject, models), place)
        if kind == "perplexity":
            cut = self.windows[name]
            model = models.get(subject)
            return [
                measures.perplexity(
                    cut.key, measure_perplexity(model, subject.folder, cut, kernels=o.kernels, **common)
                )
            ]
        if kind == "divergence":
            return self._divergence(subject, self.windows[name], models, common)
        assert self.tasks is not None
        model = models.get(subject)
        tokenizer = models.tokenizer(subject)
        shown = models.shown[subject.label]
        return self.tasks.run(name, model, tokenizer, o.settings, journal, shown=shown, progress=o.progress)

    def _divergence(self, subject: Subject, cut: Windows, models: Models, common: dict[str, Any]) -> list[Measure]:
        o = self.options
        assert self.base is not None
        with ExitStack() as stack:
            if models.fit(self.base, subject):
                base = divergence.loaded(models.get(self.base, keep=True), cut, self.place)
            else:
                self.note(
                    f"{subject.given} and its base do not fit in memory together: the base's log-probabilities are "
                    "stored on disk"
                )
                models.drop()
                reference = self.base
                make_folder(o.out)
                base = stack.enter_context(
                    divergence.stored(
                        lambda: models.load(reference),
                        cut,
                        batch=o.batch,
                        device=self.place,
                        folder=o.out,
                        progress=o.progress,
                        journal=common["journal"],
                    )
                )
            model = models.get(subject)
            mine, theirs = models.shown[subject.label], models.shown[self.base.label]
            ran = f"both in {mine}" if mine == theirs else f"in {theirs} and in {mine}"
            name = f"base {self.base.fingerprint[:8]}"
            found = divergence.measure(base, model, subject.folder, cut, base_name=name, shown=ran, **common)
        return measures.divergence(cut.key, found, self.base.label)

    def _speed(self, subject: Subject, models: Models) -> speed.Speed:
        """Measured once for both tasks, in a separate process, while no other model is in memory."""
        o = self.options
        models.drop()
        models.check(subject)
        if subject.label not in models.speeds:
            models.speeds[subject.label] = speed.measure(
                subject.folder,
                dtype=o.dtype,
                device=o.device,
                repeats=o.repeats,
                prompt=o.prompt,
                tokens=o.tokens,
                kernels=o.kernels,
                trust_remote_code=o.trust_remote_code,
            )
        return models.speeds[subject.label]


def _whole(name: str, text: str) -> str:
    """A task's full name, with its text, so that each task has a single name."""
    kind, colon, given = name.partition(":")
    if kind not in ("perplexity", "divergence"):
        return name
    if colon and not given:
        raise LlmqError(f"a task like '{kind}:wikitext2' needs a text after the colon")
    return name if given else f"{kind}:{text}"
