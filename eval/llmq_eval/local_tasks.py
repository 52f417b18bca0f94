"""Zero-shot data from a local folder instead of the hub: task files for lm-eval that keep its prompts and metrics.

A task file includes lm-eval's definition of the task and replaces only the source of its documents. The documents are
the rows of `<task>_<split>.jsonl` (.json, .txt are not read), with the columns of the task's data set on the hub; for a
few tasks, rows with common simpler columns are converted to those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmq.data.rows import Row, jsonl_rows
from llmq.errors import LlmqError
from llmq_eval.results import write

SPLITS = ("train", "dev", "validation", "test")
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Data:
    """A task's local files: split → file; subject: the column with the subtask of each row, for a group."""

    task: str
    files: Mapping[str, Path]
    subject: str | None = None


def from_folder(task: str, definitions: Mapping[str, Path], data_dir: Path, out: Path) -> dict[str, str]:
    """Write the task files of a task or group, with its local documents, to `out`; returns the documents' fingerprints.

    The fingerprints are keyed by task: of `task`, and of each of its subtasks that has its own file. A group needs one
    file per subtask, or (mmlu) one for all. definitions: lm-eval's own file of each subtask, or of the task itself.
    Raises LlmqError if there are no local files, or they cannot be used.
    """
    data = find(task, data_dir)
    if data is not None and (data.subject is not None or task in definitions):
        write_tasks(data, definitions, out)
        return {task: fingerprint([data])}
    if data is not None:
        raise LlmqError(
            f"{task} is a group of {', '.join(definitions)}: {', '.join(map(str, data.files.values()))} does not say "
            "which row belongs to which; give a file for each of them"
        )
    found = {leaf: find(leaf, data_dir) for leaf in definitions}
    for leaf, of in found.items():
        if of is None:
            there = sorted(file.name for file in data_dir.glob("*.jsonl"))
            have = ", ".join(there[:6]) or "no .jsonl files"
            raise LlmqError(
                f"{task}: {data_dir} has no {leaf}_validation.jsonl or {leaf}_test.jsonl, only {have}; without "
                "--data-dir the documents come from the hub"
            )
    parts = {leaf: of for leaf, of in found.items() if of is not None}
    for leaf, of in parts.items():
        write_tasks(of, {leaf: definitions[leaf]}, out)
    return {task: fingerprint(list(parts.values()))} | {leaf: fingerprint([of]) for leaf, of in parts.items()}


def find(task: str, data_dir: Path) -> Data | None:
    """The local files of a task or group, or None if there are none."""
    files = {split: data_dir / f"{task}_{split}.jsonl" for split in SPLITS}
    there = {split: file for split, file in files.items() if file.is_file()}
    return Data(task, there, "subject" if task == "mmlu" else None) if there else None


def fingerprint(of: Sequence[Data]) -> str:
    """A hash of the files' contents, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for split, file in (pair for data in of for pair in sorted(data.files.items())):
        digest.update(f"{split} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def write_tasks(data: Data, definitions: Mapping[str, Path], out: Path) -> None:
    """Write `<task>.yaml` and its documents to `out`, for `llmq eval` and for `lm_eval --include_path OUT`.

    definitions: lm-eval's own file of each (sub)task. Raises LlmqError naming file and line of an invalid row, or the
    subtasks without rows.
    """
    rows = {split: list(_rows(data, split)) for split in data.files}
    if data.subject is None:
        _write(data.task, definitions[data.task], rows, out)
        return
    for name, definition in definitions.items():
        subject = name.removeprefix(f"{data.task}_")
        own = {split: [row for row in of if row.get(data.subject) == subject] for split, of in rows.items()}
        own = {split: of for split, of in own.items() if of}
        if not own:
            given = sorted({str(row.get(data.subject)) for of in rows.values() for row in of})
            raise LlmqError(
                f"{', '.join(map(str, data.files.values()))} has no rows of {subject!r}, which {data.task} needs; "
                f"it has {', '.join(given[:8])}{' …' if len(given) > 8 else ''}"
            )
        _write(name, definition, own, out)


def _write(task: str, definition: Path, rows: Mapping[str, list[dict[str, Any]]], out: Path) -> None:
    files = {}
    for split, of in rows.items():
        file = (out / "data" / f"{task}_{split}.jsonl").resolve()
        _keep(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of))
        files[split] = str(file)
    found = _splits(definition)
    wanted = [found.get(name) for name in ("test_split", "validation_split")]
    if not any(split in files for split in wanted if split):
        raise LlmqError(
            f"{task}: its documents are the {' or '.join(sorted({str(s) for s in wanted if s}))} split, and there is "
            f"only {', '.join(sorted(files))}: rename the file to {task}_SPLIT.jsonl"
        )
    # A split without a file must be removed, or lm-eval fails; few-shot examples then come from the documents
    # themselves.
    gone = {name: None for name, split in found.items() if split is not None and split not in files}
    task_file = {
        "include": str(definition.resolve()),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **gone,
    }
    _keep(out / f"{task}.yaml", yaml.safe_dump(task_file, sort_keys=False, allow_unicode=True))


def _keep(file: Path, text: str) -> None:
    """Write a file unless it exists with the same text: `datasets` converts a file again if its time has changed."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write(file, text)


def _splits(definition: Path) -> dict[str, str | None]:
    """The names of the splits that a task uses, with its includes resolved."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(definition, resolve_func=False)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    return {key: config.get(key) for key in keys}


def _rows(data: Data, split: str) -> Iterator[dict[str, Any]]:
    """The documents of a split, with the columns of the hub's data set."""
    rewrite = _REWRITE.get(data.task, _as_it_is)
    empty = True
    for row in jsonl_rows(data.files[split], "evaluation data"):
        empty = False
        yield rewrite(row)
    if empty:
        raise LlmqError(f"{data.files[split]} is empty: give a JSON object on each line")


def _as_it_is(row: Row) -> dict[str, Any]:
    return dict(row.fields)


def _text(row: Row, column: str) -> str:
    value = row.fields.get(column)
    if not isinstance(value, str):
        have = ", ".join(map(str, row.fields)) or "none"
        said = "holds no text" if column in row.fields else "is missing"
        raise LlmqError(f"{row.where}: column {column!r} {said}; its columns are {have}")
    return value


def _texts(row: Row, column: str) -> list[str]:
    value = row.fields.get(column)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) for one in value):
        raise LlmqError(f"{row.where}: column {column!r} must be a list of two or more texts, not {_short(value)}")
    return value


def _index(row: Row, column: str, choices: int) -> int:
    value = row.fields.get(column)
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < choices:
        raise LlmqError(f"{row.where}: column {column!r} must be a number from 0 to {choices - 1}, not {_short(value)}")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " …"


def _hellaswag(row: Row) -> dict[str, Any]:
    endings = _texts(row, "endings")
    if "ctx_a" in row.fields:
        first, second = _text(row, "ctx_a"), _text(row, "ctx_b")
    else:
        # On the hub the unfinished last sentence is a separate column, which the prompt capitalizes.
        context = _text(row, "ctx")
        unfinished = re.search(r"(?<=[.!?]) ([a-z][^.!?]*)$", context)
        first, second = (context[: unfinished.start()], unfinished[1]) if unfinished else (context, "")
    label = str(_index(row, "label", len(endings)))
    return {
        "activity_label": _text(row, "activity_label"),
        "ctx_a": first,
        "ctx_b": second,
        "endings": endings,
        "label": label,
    }


def _piqa(row: Row) -> dict[str, Any]:
    texts = {column: _text(row, column) for column in ("goal", "sol1", "sol2")}
    return texts | {"label": _index(row, "label", 2)}


def _arc(row: Row) -> dict[str, Any]:
    if "answerKey" in row.fields:
        return _arc_of_the_hub(row)
    choices = _texts(row, "choices")
    letters = list(LETTERS[: len(choices)])
    answer = _index(row, "answer", len(choices))
    return {
        "question": _text(row, "question"),
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[answer],
    }


def _arc_of_the_hub(row: Row) -> dict[str, Any]:
    choices = row.fields.get("choices")
    labels, texts = (choices.get(name) if isinstance(choices, dict) else None for name in ("label", "text"))
    if not (isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts) > 1):
        raise LlmqError(
            f"{row.where}: with 'answerKey', column 'choices' must hold lists 'text' and 'label' of one length, "
            f"not {_short(choices)}"
        )
    _text(row, "question")
    if row.fields["answerKey"] not in labels:
        raise LlmqError(f"{row.where}: column 'answerKey' must be one of {labels}, not {row.fields['answerKey']!r}")
    return dict(row.fields)


def _mmlu(row: Row) -> dict[str, Any]:
    choices = _texts(row, "choices")
    if len(choices) != 4:
        raise LlmqError(f"{row.where}: column 'choices' must have 4 texts, not {len(choices)}")
    answer = _index(row, "answer", 4)
    return {
        "subject": _text(row, "subject"),
        "question": _text(row, "question"),
        "choices": choices,
        "answer": answer,
    }


def _winogrande(row: Row) -> dict[str, Any]:
    texts = {column: _text(row, column) for column in ("sentence", "option1", "option2")}
    if "_" not in texts["sentence"]:
        raise LlmqError(f"{row.where}: column 'sentence' has no '_' where the options go")
    answer = str(row.fields.get("answer"))
    if answer not in ("1", "2"):
        raise LlmqError(f"{row.where}: column 'answer' must be 1 or 2, not {_short(row.fields.get('answer'))}")
    return texts | {"answer": answer}


def _boolq(row: Row) -> dict[str, Any]:
    label = row.fields.get("label", row.fields.get("answer"))
    if label not in (0, 1):
        raise LlmqError(f"{row.where}: column 'label' must be 0 (no) or 1 (yes), not {_short(label)}")
    return {"passage": _text(row, "passage"), "question": _text(row, "question"), "label": int(label)}


def _lambada(row: Row) -> dict[str, Any]:
    return {"text": _text(row, "text")}


_REWRITE: dict[str, Callable[[Row], dict[str, Any]]] = {
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "mmlu": _mmlu,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "lambada_openai": _lambada,
}
