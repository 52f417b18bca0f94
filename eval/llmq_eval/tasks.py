"""Zero-shot and few-shot tasks through lm-eval: its prompts, metrics and model adapter, llmq's loader and journal."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmq import ranks
from llmq.errors import LlmqError, first_line
from llmq_eval import intervals, local_tasks
from llmq_eval.journal import Journal
from llmq_eval.processes import everyone, first_heard, mine
from llmq_eval.results import Measure

OWN = ("perplexity", "divergence", "speed", "memory")
"""Tasks that do not need lm-eval."""
SHARES = re.compile(r"(acc|exact_match|em|f1)(_|\b)")
"""Metrics of lm-eval that are fractions of 1; others are perplexities, bits, scores …"""
INSTALL = "pip install 'llmq[eval]'"


@dataclass(frozen=True)
class Settings:
    """limit: documents per task (below 1: a fraction of them), None for all; fewshot: examples, None for the task's
    own.

    batch: requests per forward pass, or 'auto' for as many as fit a GPU (1 on a CPU, where padding costs time and
    larger batches gain little).
    """

    limit: float | None = None
    fewshot: int | None = None
    batch: int | str = 1


class Tasks:
    """The tasks of lm-eval by name, some with local documents. Raises LlmqError without lm-eval or for unknown names.

    include: folder of the task files made from `data_dir`; both are None if the documents come from the hub.
    """

    def __init__(self, names: Sequence[str], data_dir: Path | None = None, include: Path | None = None) -> None:
        manager = known = _manager()
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            raise unknown_task(unknown[0], manager.all_tasks)
        self.names = tuple(names)
        self.data: dict[str, str] = {}
        if data_dir is not None:
            assert include is not None
            for name in names:
                self._from_folder(manager, name, data_dir, include)
            manager = _manager(include)
            for name, entry in known.task_index.items():
                manager.task_index.setdefault(name, entry)
        self.manager = manager

    def _from_folder(self, manager: Any, name: str, data_dir: Path, include: Path) -> None:
        parts = leaves(manager, name)
        code = [leaf for leaf in parts if manager.task_index[leaf].kind.name == "PY_TASK"]
        if code:
            raise LlmqError(
                f"{name}: lm-eval defines {code[0]} by Python code, which loads its own documents: leave out --data-dir"
            )
        definitions = {leaf: Path(manager.task_index[leaf].yaml_path) for leaf in parts}
        self.data |= local_tasks.from_folder(name, definitions, data_dir, include)

    def fingerprint(self, name: str) -> str:
        """The fingerprint of a task's local documents; 'hub' if they come from the hub."""
        return self.data.get(name, "hub")

    def run(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        settings: Settings,
        journal: Journal,
        *,
        shown: str,
        progress: bool = True,
    ) -> list[Measure]:
        """The measures of one task or group. shown: the dtype the model runs in, for the protocol.

        Raises LlmqError if its documents are not available, or the model fails or overflows.
        """
        from lm_eval import simple_evaluate

        adapter = _adapter(model, tokenizer, settings, journal, progress)
        _quiet()
        try:
            # lm-eval asks git for the commit of the current directory, and git's error would appear on the terminal;
            # and it asks pip, for a second of each task, for what is installed.
            with (
                patch("lm_eval.evaluator.get_git_commit_hash", str, create=True),
                patch("lm_eval.evaluator.add_env_info", lambda *_: None, create=True),
                first_heard(),
            ):
                found = simple_evaluate(
                    model=adapter,
                    tasks=[name],
                    num_fewshot=settings.fewshot,
                    limit=settings.limit,
                    task_manager=self.manager,
                    bootstrap_iters=1000 if ranks.first() else 0,
                    log_samples=True,
                )
        except LlmqError:
            raise
        except Exception as error:
            raise self._explained(name, error) from error
        adapter.flush()
        # The size that 'auto' finds on a GPU differs between models; in the protocol it would prevent every comparison.
        batch = 1 if settings.batch == "auto" and model.device.type == "cpu" else settings.batch
        each = "" if batch == 1 or ranks.size() == 1 else f" on each of {ranks.size()} ranks"
        # lm-eval has its results where the rank on its machine is 0.
        made = _measures(name, found, self.data, f"{shown}, batch {batch}{each}") if ranks.first() else []
        return ranks.tell(made)

    def _explained(self, name: str, error: Exception) -> LlmqError:
        from llmq.checkpoint import hub

        if "sample larger than population" in str(error).lower():
            return LlmqError(f"{name}: it has fewer documents than few-shot examples: lower --num-fewshot")
        if name not in self.data:
            try:
                told = hub.explain(error, name, "dataset")
                return LlmqError(f"{told}; or give a folder with {name}_validation.jsonl as --data-dir")
            except Exception:
                if os.environ.get("HF_HUB_OFFLINE") or isinstance(error, ConnectionError | FileNotFoundError):
                    return LlmqError(
                        f"{name}: its documents cannot be fetched from the hub ({first_line(error)}); check the "
                        "network, "
                        f"or give a folder with {name}_validation.jsonl as --data-dir"
                    )
        if isinstance(error, AssertionError):
            line = traceback.extract_tb(error.__traceback__)[-1].line or ""
            if "max_length" in line:
                return LlmqError(
                    f"{name}: one of its answers has more tokens than the model takes: leave this task out"
                )
            return LlmqError(f"{name}: lm-eval failed on it: {line or 'an assertion'}")
        hint = f"; its documents are from {name}_*.jsonl, which may have the wrong columns" if name in self.data else ""
        return LlmqError(f"{name}: lm-eval failed on it: {type(error).__name__}: {first_line(error)}{hint}")


def unknown_task(name: str, known: Sequence[str]) -> LlmqError:
    """The error for an unknown task, with the nearest known ones."""
    near = difflib.get_close_matches(name, [*OWN, *known], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(OWN)} and the tasks of lm-eval"
    return LlmqError(f"unknown task {name!r}: {hint}")


def installed() -> bool:
    """Whether lm-eval is installed."""
    return importlib.util.find_spec("lm_eval") is not None


def check_installed(names: Sequence[str]) -> None:
    """Raise LlmqError if lm-eval, which these tasks need, is not installed."""
    if not installed():
        near = difflib.get_close_matches(names[0], OWN, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}? Other tasks are lm-eval's: " if near else "it is a task of lm-eval: "
        raise LlmqError(f"{names[0]}: {hint}{INSTALL}")


@cache
def _own() -> Any:
    """lm-eval's own tasks; takes ten seconds, as there are thousands of files."""
    _quiet()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(include: Path | None = None) -> Any:
    """lm-eval's own tasks, or only those of a folder."""
    if include is None:
        return _own()
    _quiet()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include), include_defaults=False)


def leaves(manager: Any, name: str) -> list[str]:
    """The tasks of a group, including those of its groups and tags, in order; for a task, the task itself."""
    entry = manager.task_index[name]
    if entry.kind.name in ("TASK", "PY_TASK"):
        return [name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    from lm_eval.tasks._yaml_loader import load_yaml

    members = load_yaml(entry.yaml_path, resolve_func=False)["task"]
    return [
        leaf for member in members for leaf in leaves(manager, member if isinstance(member, str) else member["task"])
    ]


def _quiet() -> None:
    """Silence lm-eval's log of its decisions; the relevant ones are in the protocol."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _adapter(model: Any, tokenizer: Any, settings: Settings, journal: Journal, progress: bool) -> Any:
    """lm-eval's own adapter around a loaded model; requests in the journal are answered from it.

    lm-eval sorts the requests and splits them into batches. So that a resumed run makes the same batches, the journal
    must hold whole batches: answers are written when the next batch begins.

    Ranks share the requests here, where all of them have been made. lm-eval's own sharing is of documents, before: each
    rank would draw other few-shot examples than one process, and one without a document would fail.
    """
    import hashlib
    import json

    import torch

    from llmq.inference.pretrained import input_device

    _quiet()
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):  # type: ignore[misc]
        def __init__(self) -> None:
            batch = settings.batch
            if batch == "auto" and model.device.type == "cpu":
                batch = 1
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            if model.device.type == "meta":  # its first weights are offloaded to disk
                self._device = torch.device(input_device("auto"))
            self.pending: dict[str, Any] = {}
            self.cache_hook = self
            if batch == "auto":
                # A batch size found again for the remaining requests could differ, and change the last digits.
                if "batch" not in journal.done:
                    journal.add({"batch": min(everyone(int(self._detect_batch_size())))})
                self.batch_size_per_gpu = journal.done["batch"]

        @property
        def prefix_token_id(self) -> Any:
            prefix = super().prefix_token_id
            if prefix is None:
                raise LlmqError(
                    f"{model.name_or_path}: its tokenizer has neither a BOS nor an EOS token, one of which lm-eval "
                    "needs: add one to its tokenizer_config.json"
                )
            return prefix

        def set_cache_hook(self, cache_hook: Any) -> None:
            return

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            number = answer[0] if isinstance(answer, tuple | list) else answer
            if isinstance(number, float) and not math.isfinite(number):
                # Not written to the journal, whose answers are never computed again.
                dtype = str(model.dtype).removeprefix("torch.")
                raise LlmqError(
                    f"{model.name_or_path}: a log likelihood is {number}; the model overflows in {dtype}, "
                    "try --dtype float32"
                )
            self.pending[key(kind, request)] = answer

        def flush(self) -> None:
            journal.add(self.pending)
            self.pending = {}

        def _model_call(self, *args: Any, **named: Any) -> Any:
            self.flush()
            return super()._model_call(*args, **named)

        def _model_generate(self, *args: Any, **named: Any) -> Any:
            self.flush()
            return super()._model_generate(*args, **named)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self.resumed("loglikelihood", requests, super().loglikelihood)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self.resumed("loglikelihood_rolling", requests, super().loglikelihood_rolling)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self.resumed("generate_until", requests, super().generate_until)

        def resumed(self, kind: str, requests: Any, ask: Any) -> list[Any]:
            found = {i: journal.done.get(key(kind, request.args)) for i, request in enumerate(requests)}
            left = [i for i in dealt(requests) if found[i] is None]
            answers = ask([requests[i] for i in left], disable_tqdm=not progress) if left else []
            self.flush()
            for of_rank in everyone(dict(zip(left, answers, strict=True))):
                found |= of_rank
            journal.share()
            return [whole(found[i]) for i in range(len(requests))]

    def key(kind: str, request: Any) -> str:
        return hashlib.sha256(json.dumps([kind, *request], default=str).encode()).hexdigest()[:32]

    def whole(answer: Any) -> Any:
        return tuple(answer) if isinstance(answer, list) else answer

    return Adapter()


def dealt(requests: Sequence[Any]) -> list[int]:
    """The places of this rank's requests: documents go to the ranks in turn, as requests of one can share a run."""
    by_document = groupby(range(len(requests)), lambda i: (requests[i].task_name, requests[i].doc_id))
    return [place for places in mine([list(places) for _, places in by_document]) for place in places]


def _measures(name: str, found: dict[str, Any], local: Mapping[str, str], ran: str) -> list[Measure]:
    """The measures of a task, of each task of a tag, or of a whole group. local: documents' fingerprints by task."""
    group = name in found.get("groups", {})
    parts = sorted(found["samples"]) if group else list(found["samples"])
    made = []
    scopes = [name] if name in found["results"] else parts
    for scope in scopes:
        of = parts if group else [scope]
        documents = sum(found["n-samples"][leaf]["effective"] for leaf in of)
        files = local.get(scope, local.get(name))
        shots = " or ".join(f"{count}-shot" for count in sorted({found["n-shot"][leaf] for leaf in of}))
        kinds = " or ".join(sorted({found["configs"][leaf]["output_type"] for leaf in of}))
        protocol = (
            f"lm-eval {_version()}, {scope} version {found['versions'].get(scope)}, {shots}, "
            f"{documents} documents{'' if files is None else f' from local files {files[:8]}'}, {kinds}, {ran}"
        )
        for label, value in found["results"][scope].items():
            metric, _, kind = label.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found["results"][scope].get(f"{metric}_stderr,{kind}")
            metric = metric if kind == "none" else f"{metric} ({kind})"
            directions = found.get("higher_is_better", {})
            of_task = directions.get(scope) or directions.get(parts[0]) or {}
            better = of_task.get(label.partition(",")[0])
            made.append(_measure(scope, metric, float(value), stderr, better, protocol, _samples(found, of, label)))
    return made


def _samples(found: dict[str, Any], leaves: Sequence[str], label: str) -> list[float] | None:
    """The metric's value for each document, in order; None if it is not defined per document."""
    metric, _, kind = label.partition(",")
    values = []
    for leaf in leaves:
        rows = [row for row in found["samples"][leaf] if row.get("filter", "none") == kind]
        for row in sorted(rows, key=lambda row: int(row["doc_id"])):
            value = row.get(metric)
            if isinstance(value, bool | int | float):
                values.append(float(value))
            else:
                return None
    return values or None


def _measure(
    task: str, metric: str, value: float, stderr: Any, better: Any, protocol: str, samples: list[float] | None
) -> Measure:
    low = high = None
    if samples and metric != "perplexity" and not math.isclose(sum(samples) / len(samples), value, abs_tol=1e-9):
        samples = None  # a group's mean over its tasks, or a metric that is not a mean
    right_or_wrong = bool(samples) and set(samples or ()) <= {0.0, 1.0}
    # Some tasks give F1 in percent: a value above 1 is not a fraction.
    unit = "share" if (right_or_wrong or SHARES.match(metric)) and 0 <= value <= 1 else ""
    if metric == "perplexity" and samples:
        samples = [-one for one in samples]
        _, below, above = intervals.mean(samples)
        low, high = (None, None) if below is None or above is None else (math.exp(below), math.exp(above))
    elif samples and right_or_wrong:
        low, high = intervals.share(sum(samples), len(samples))
    elif isinstance(stderr, int | float):
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    return Measure(task, metric, value, low, high, unit, better, protocol, samples)


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
