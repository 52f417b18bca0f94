"""Rows of text data: where they come from (a local file, a streamed hub data set) and which text they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmq.checkpoint import hub
from llmq.data import chats
from llmq.data.answers import CHOSEN, COMPLETION, PLUS, REJECTED, joined
from llmq.data.chats import CHAT, chat_messages
from llmq.data.files import ENDINGS, Row, jsonl_rows, parquet_rows, rows_of, stored
from llmq.data.opened import NO_TEXT, PACKED
from llmq.errors import LlmqError, first_line
from llmq.recipe.recipe import Calibration

__all__ = ["Row", "RowReader", "chat_messages", "hub_rows", "jsonl_rows", "parquet_rows", "rows_of"]

LOOKED_AT = 32
"""Rows that are looked at before the column is chosen: the first may have no chat, or an empty one."""
_BESIDE = ("system", "tools", "functions")
"""Columns that belong to a chat and are not the chat."""
_PLAIN = (".txt", ".md", *NO_TEXT)


class RowReader:
    """Finds the text of each row: a named column, chat messages, 'text', a prompt with its answer, or the only column
    that holds a string.
    """

    def __init__(self, name: str, column: str | None, tokenizer: Any) -> None:
        self.name = name
        self.column = column
        self.named = column is not None
        self.tokenizer = tokenizer
        self.refused = 0
        self.refusal = ""
        self.hidden: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.choice = ""
        self.chosen_at = ""

    def look(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, after the column was chosen by the first of them. Raises LlmqError."""
        source = iter(rows)
        held: list[Row] = []
        problem: LlmqError | None = None
        while self.column is None and len(held) < LOOKED_AT and not (held and _chat_columns(held[-1:])):
            try:
                row = next(source, None)
            except LlmqError as error:  # raised below, where the rows before it have been read
                problem = error
                break
            if row is None:
                break
            held.append(row)
        if held and self.column is None:
            self.column = self._choose(held)
        yield from held
        if problem is not None:
            raise problem
        yield from source

    def text(self, row: Row) -> str:
        """The row's text, through the chat template if it is a chat; empty if it holds none. Raises LlmqError."""
        if not self.named:
            chats.check_media(row.fields, row.where, ", or name the column of text with --column")
        if self.column is None:
            self.column = self._choose([row])
        fields = row.fields if self.named and self.column in row.fields else _joined(row.fields)
        if self.column not in fields:
            parts = [row.fields.get(part, "") for part in self.column.split(PLUS)]
            if len(parts) > 1 and None in parts:
                return ""
            lacks = f"{row.where} has no column {self.column!r}, only {_names(fields)}"
            if self.named:
                raise LlmqError(
                    f"{lacks}: name the one with the text with --column, or as 'column' in the recipe's calibration"
                )
            raise LlmqError(
                f"{lacks}, unlike {self.chosen_at}: put rows of different kinds into files of their own, or name a "
                "column that every row has with --column"
            )
        value = fields[self.column]
        if value is None:
            return ""
        messages = chat_messages(value)
        if messages:
            return self._chat(row, messages)
        if isinstance(value, str):
            if chats.is_repr(value):
                raise LlmqError(f"{row.where}: column {self.column!r} holds a list that is not JSON: write it as JSON")
            chats.check_text(value, f"{row.where}: column {self.column!r}")
            return value if value.strip() else ""
        if messages is None:
            raise LlmqError(
                f"{row.where}: column {self.column!r} holds neither a text nor a list of chat messages, but a value of "
                f"type {type(value).__name__}: mend the row, or name another column with --column"
            )
        return ""

    def notes(self) -> tuple[str, ...]:
        """Which column was taken of several; what the chat template refuses or does not show."""
        what = f"calibration text {self.name}: "
        notes = [what + self.choice] if self.choice else []
        if self.refused:
            notes.append(f"{what}the chat template refused {self.refused} rows ({self.refusal})")
        for part, count in self.hidden.items():
            notes.append(f"{what}the chat template does not show the {part} of {count} rows (first {self.first[part]})")
        return tuple(notes)

    def reasons(self) -> str:
        """What was refused, to append to an error message."""
        return f" (the chat template refused {self.refused} rows: {self.refusal})" if self.refused else ""

    def _choose(self, rows: list[Row]) -> str:
        """The column of the first rows; `choice` says what else there was. Raises LlmqError if there is none."""
        column = self._choice(rows)
        self.chosen_at = next((row.where for row in rows if column in _joined(row.fields)), self.name)
        return column

    def _choice(self, rows: list[Row]) -> str:
        columns = list(dict.fromkeys(name for row in rows for name in _joined(row.fields)))
        held = [_joined(row.fields) for row in rows]
        strings = [name for name in columns if any(isinstance(fields.get(name), str) for fields in held)]
        worse = [name for name in REJECTED if any(fields.get(name) is not None for fields in held)]
        past = any(fields.get("history") for fields in held)
        found = _chat_columns(rows)
        if found:
            beside = ["text"] * ("text" in strings) + ["history"] * (past and PLUS in found[0])
            self._tell(found[0], [*found[1:], *beside, *worse], "the chats")
            return found[0]
        message = next((row for row in rows if chat_messages([row.fields])), None)
        if message is not None:
            raise LlmqError(
                f"{message.where} is one message of a chat: a row holds the whole chat, as a list of its messages in "
                "a column 'messages'"
            )
        if "text" in strings:
            return "text"
        empty = [name for name in columns if any(fields.get(name) == [] for fields in held)]
        if empty and (empty[0] in CHAT or not strings):
            return empty[0]
        pair = next((both.name for row in rows if (both := joined(row.fields))), None)
        if pair is not None:
            self._tell(pair, ["system"] * ("system" in strings) + ["history"] * past + worse, "the texts")
            return pair
        more = [n for n in columns if any(fields.get(n) and isinstance(fields[n], list | Mapping) for fields in held)]
        if any(name in more for name in (*CHOSEN, COMPLETION)):
            words = []
        elif more:  # the text may be in there: what is no prose is not taken for it
            words = [name for name in strings if name not in _BESIDE and not all(_word(f.get(name)) for f in held)]
        else:
            words = [name for name in strings if not all(_number(fields.get(name)) for fields in held)] or strings
        if any(better in words for better in CHOSEN):
            words = [name for name in words if name not in worse]
        if len(words) == 1:
            self._tell(words[0], [*worse, *more], "the texts")
            return words[0]
        what = "more than one column of text" if words else "no column of text"
        raise LlmqError(
            f"calibration text {self.name} has {what}, its columns are {_names(columns)}: "
            "name one with --column, or as 'column' in the recipe's calibration"
        )

    def _tell(self, column: str, others: Iterable[str], what: str) -> None:
        """Note which column was taken if there are others that could be meant."""
        more = ", ".join(map(repr, dict.fromkeys(others)))
        if more:
            self.choice = (
                f"{what} of column {column!r} are taken, not {more}; "
                "name another with --column, or as 'column' in the recipe's calibration"
            )

    def _chat(self, row: Row, messages: chats.Messages) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise LlmqError(
                f"calibration text {self.name} holds chats (column {self.column!r}), and the tokenizer has no chat "
                "template: give plain text, or name a column of text with --column"
            )
        clean = chats.clean(chats.with_system(messages, row.fields), f"{row.where}: column {self.column!r}")
        tools = chats.tools_of(_joined(row.fields), row.where)
        try:
            made = chats.render(self.tokenizer, clean, tools)
        except chats.TemplateRefusal as error:
            self.refused += 1
            self.refusal = self.refusal or f"first {row.where}: {error}"
            return ""
        for part in made.hidden:
            self.hidden[part] += 1
            self.first.setdefault(part, row.where)
        return made.text


def _chat_columns(rows: list[Row]) -> list[str]:
    """The columns that hold a chat in some row: known names first, then in the columns' order, worse answers last."""
    found = [name for row in rows for name, value in _joined(row.fields).items() if chat_messages(value)]
    names = sorted(dict.fromkeys([*CHAT, *found]), key=lambda name: name in REJECTED)
    return [name for name in names if name in found]


def _joined(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose prompt and answer are one column."""
    both = joined(fields)
    return fields if both is None else both.fields


def _number(value: Any) -> bool:
    """Whether a value is no text, or the text of a number, as every value of a CSV is."""
    if not isinstance(value, str) or not value.strip():
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True


def _word(value: Any) -> bool:
    """Whether a value is no text, or one word, such as an identifier."""
    return not isinstance(value, str) or (value.isascii() and len(value.split()) <= 1)


def _names(fields: Iterable[str]) -> str:
    return ", ".join(map(str, fields)) or "none"


def hub_rows(calibration: Calibration) -> Iterator[Row]:
    """The rows of a hub data set, streamed: only the rows that are read are fetched. 'org/name:config' names a
    configuration.

    Raises LlmqError if the data set is missing, gated, out of reach, or has no such configuration or split.
    """
    name, _, config = calibration.text.partition(":")
    if hub.is_path(name) or name.lower().endswith((*ENDINGS, *PACKED, *_PLAIN)):
        raise LlmqError(f"calibration text {calibration.text}: no such file")
    info = hub.repository(name, "dataset")
    import datasets
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    try:
        # The commit, not the branch: the data cannot change after the look-up, and the data set viewer is not used.
        rows = datasets.load_dataset(name, config or None, split=calibration.split, revision=info.sha, streaming=True)
        types = getattr(rows, "features", None) or {}
        exact = tuple(kind for kind in (getattr(datasets, "Json", None),) if kind)
        for number, fields in enumerate(rows):
            held = {key: stored(value, types.get(key), exact) for key, value in fields.items()}
            yield Row(f"{name} row {number}", held)
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
