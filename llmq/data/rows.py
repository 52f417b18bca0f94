"""Rows of text data: where they come from (.jsonl, .parquet, a streamed hub data set) and which text they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import hub
from llmq.errors import LlmqError, first_line
from llmq.recipe.recipe import Calibration

CHAT = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_FILE_ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".md", ".gz", ".zst", ".zip")


@dataclass(frozen=True)
class Row:
    """where: the file and line, or the row's number, for error messages."""

    where: str
    fields: Mapping[str, Any]


class RowReader:
    """Finds the text of each row: a named column, 'text', chat messages, or the only column that holds a string."""

    def __init__(self, name: str, column: str | None, tokenizer: Any) -> None:
        self.name = name
        self.column = column
        self.tokenizer = tokenizer
        self.refused = 0
        self.refusal = ""

    def text(self, row: Row) -> str:
        """The row's text, through the chat template if it is a chat; empty if it holds none. Raises LlmqError."""
        if self.column is None:
            self.column = self._choose(row)
        if self.column not in row.fields:
            raise LlmqError(
                f"{row.where} has no column {self.column!r}, only {_names(row.fields)}: "
                "name the one with the text as 'column' in the recipe's calibration"
            )
        value = row.fields[self.column]
        if value is None:
            return ""
        if isinstance(value, str):
            return value if value.strip() else ""
        messages = chat_messages(value)
        if messages is None:
            raise LlmqError(f"{row.where}: column {self.column!r} holds neither a text nor a list of chat messages")
        return self._chat(row, messages) if messages else ""

    def notes(self) -> tuple[str, ...]:
        """How many rows were left out, and why."""
        if not self.refused:
            return ()
        return (f"calibration text {self.name}: the chat template refused {self.refused} rows ({self.refusal})",)

    def reasons(self) -> str:
        """The same text as `notes`, to append to an error message."""
        return f" (the chat template refused {self.refused} rows: {self.refusal})" if self.refused else ""

    def _choose(self, row: Row) -> str:
        fields = row.fields
        if isinstance(fields.get("text"), str):
            return "text"
        for name in CHAT:
            if chat_messages(fields.get(name)) is not None:
                return name
        strings = [name for name, value in fields.items() if isinstance(value, str)]
        if len(strings) == 1:
            return strings[0]
        what = "more than one column of text" if strings else "no column of text"
        raise LlmqError(
            f"calibration text {self.name} has {what}, its columns are {_names(fields)}: "
            "name one as 'column' in the recipe's calibration"
        )

    def _chat(self, row: Row, messages: list[dict[str, Any]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise LlmqError(
                f"calibration text {self.name} holds chats (column {self.column!r}), and the tokenizer has no chat "
                "template: give plain text, or name a column of text as 'column' in the recipe's calibration"
            )
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            self.refused += 1
            self.refusal = self.refusal or f"first {row.where}: {first_line(error)}"
            return ""
        return text


def chat_messages(value: Any) -> list[dict[str, Any]] | None:
    """Chat messages as {role, content}, from either of the two common spellings; None for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return None
    messages = []
    for item in value:
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or content is None:
            return None
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "none"


def jsonl_rows(file: Path, what: str = "calibration text") -> Iterator[Row]:
    """A JSON object, or a JSON string (a row of nothing but text), on each line. Raises LlmqError with file:line."""
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if not raw.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    value = json.loads(raw.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise LlmqError(f"{where} is not UTF-8 text: give a .jsonl file, or a plain .txt") from error
                except (ValueError, RecursionError) as error:
                    raise LlmqError(f"{where} is not JSON ({error}): one JSON object on each line") from error
                if isinstance(value, str):
                    value = {"text": value}
                if not isinstance(value, dict):
                    raise LlmqError(f'{where} is not a JSON object: one object, such as {{"text": …}}, on each line')
                yield Row(where, value)
    except OSError as error:
        raise LlmqError(f"{what} {file} cannot be read: {error.strerror}") from error


def parquet_rows(file: Path) -> Iterator[Row]:
    """The rows of a parquet file, one batch in memory at a time. Raises LlmqError if it cannot be read as parquet."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=64):
                for fields in batch.to_pylist():
                    yield Row(f"{file} row {number}", fields)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise LlmqError(f"calibration text {file} cannot be read as parquet: {first_line(error)}") from error


def hub_rows(calibration: Calibration) -> Iterator[Row]:
    """The rows of a hub data set, streamed: only the rows that are read are fetched. 'org/name:config' names a
    configuration.

    Raises LlmqError if the data set is missing, gated, out of reach, or has no such configuration or split.
    """
    name, _, config = calibration.text.partition(":")
    if hub.is_path(name) or name.endswith(_FILE_ENDINGS):
        raise LlmqError(f"calibration text {calibration.text}: no such file")
    info = hub.repository(name, "dataset")
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    try:
        # The commit, not the branch: the data cannot change after the look-up, and the data set viewer is not used.
        rows = load_dataset(name, config or None, split=calibration.split, revision=info.sha, streaming=True)
        for number, fields in enumerate(rows):
            yield Row(f"{name} row {number}", fields)
    except LlmqError:
        raise
    except ValueError as error:
        lines = str(error).strip().splitlines()
        text = " ".join(line.strip() for line in lines[:2])
        if "Config name is missing" in text:
            text += f"; write {name}:CONFIG"
        elif "Bad split" in text:
            text += "; name one as 'split' in the recipe's calibration"
        raise LlmqError(f"calibration data set {calibration.text}: {text}") from error
    except Exception as error:
        if type(error).__module__.startswith("datasets."):
            raise LlmqError(f"calibration data set {calibration.text} cannot be read: {first_line(error)}") from error
        raise hub.explain(error, name, "dataset") from error
