"""Training rows, and which of their tokens are the answer: the loss is taken on those only.

A row has one of these forms, tried in this order:

    {"messages": [{"role": …, "content": …}, …]}    a chat; every answer of the assistant is learned
    {"prompt": …, "completion": …}                  a question and its answer
    {"instruction": …, "input": …, "output": …}     the same, "input" may be missing or empty
    {"text": …}                                     a plain text; all of it is learned

The first three go through the tokenizer's chat template where it has one. Where it has none, or with template="none", a
chat and an instruction are laid out as `PLAIN` says, and a prompt and its completion are joined as they are; the
end-of-text token follows each answer. The begin and end of an answer are found by rendering and tokenizing the row up
to that point and comparing with the whole row, so neither marks in the template nor a tokenizer with offsets are
needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from llmq.data.rows import CHAT, Row, chat_messages, jsonl_rows, parquet_rows
from llmq.data.tokens import encode
from llmq.errors import LlmqError, first_line

PLAIN = "### {role}:\n{content}"
"""A turn without a chat template, its role capitalized; a blank line between turns. The prompt for an answer ends with
the first line of its turn.
"""
ANSWER = "assistant"
WHAT = "fine-tuning data"


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the loss is taken on it. row: the number of its row, from 0."""

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    row: int


@dataclass(frozen=True)
class Examples:
    """All rows of a file. notes: how many rows were truncated or left out."""

    all: tuple[Example, ...]
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of the ids and the learned positions."""
        digest = hashlib.sha256()
        for example in self.all:
            digest.update(json.dumps([example.row, example.ids, example.learn]).encode())
        return digest.hexdigest()


def read(file: Path, tokenizer: Any, *, seqlen: int, template: str = "auto") -> Examples:
    """Every row of a .jsonl or .parquet file as examples of at most `seqlen` tokens.

    An instruction that is too long is truncated at its end, and left out if that removes the whole answer; a text that
    is too long becomes several examples. template: auto or none.
    Raises LlmqError, with file and line, at a row that has none of the four forms, and if there is no row at all.
    """
    file = file.expanduser()
    if not file.is_file():
        raise LlmqError(f"{WHAT} {file}: no such file; give a .jsonl with one row on each line")
    if file.suffix not in (".jsonl", ".parquet"):
        raise LlmqError(f"{WHAT} {file}: give a .jsonl file with one row on each line, or a .parquet file")
    templated = template == "auto" and bool(getattr(tokenizer, "chat_template", None))
    layout = _Layout(tokenizer, templated)
    rows = parquet_rows(file) if file.suffix == ".parquet" else jsonl_rows(file, WHAT)
    found: list[Example] = []
    count = cut = lost = 0
    for number, row in enumerate(rows):
        count += 1
        ids, learn = layout.tokens(row)
        pieces = range(0, len(ids) if all(learn) else 1, seqlen)
        for start in pieces:
            part = slice(start, start + seqlen)
            if any(learn[part][1:]):  # nothing predicts the first token
                found.append(Example(tuple(ids[part]), tuple(learn[part]), number))
        cut += len(ids) > seqlen and len(pieces) == 1
        lost += not any(learn[:seqlen][1:])
    if not count:
        raise LlmqError(f"{WHAT} {file} is empty: one row on each line, such as {{'prompt': …, 'completion': …}}")
    if not found:
        raise LlmqError(f"{WHAT} {file}: none of its {count} rows has an answer within {seqlen} tokens: raise --seqlen")
    notes = []
    if cut or lost:
        notes.append(f"{WHAT} {file}: {cut} of {count} rows were cut to {seqlen} tokens, {lost} of them left no answer")
    return Examples(tuple(found), tuple(notes))


class _Layout:
    """Turns a row into tokens."""

    def __init__(self, tokenizer: Any, templated: bool) -> None:
        self.tokenizer = tokenizer
        self.templated = templated
        self.end: str = tokenizer.eos_token or ""

    def tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """Ids and, for each, whether it is learned. Raises LlmqError naming the row."""
        what = content(row)
        if isinstance(what, str):
            ids = self._encode(what + self.end, False)
            return ids, [True] * len(ids)
        messages, joined = what
        if joined and not self.templated:
            before, whole = messages[0]["content"], "".join(m["content"] for m in messages) + self.end
            ids = self._encode(whole, False)
            start = _common(self._encode(before, False), ids)
            return ids, [i >= start for i in range(len(ids))]
        return self._chat(row, messages)

    def _chat(self, row: Row, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        whole = self._render(row, messages, False)
        ids = self._encode(whole, self.templated)
        learn = [False] * len(ids)
        turns = [i for i, message in enumerate(messages) if message["role"] == ANSWER]
        for i in turns:
            before = self._render(row, messages[:i], True) if i else ""
            through = self._render(row, messages[: i + 1], False)
            # Some templates render earlier answers differently from the last one: such earlier answers are not learned.
            if i == turns[-1] or (whole.startswith(before) and whole.startswith(through)):
                start, stop = (_common(self._encode(t, self.templated), ids) for t in (before, through))
                learn[start:stop] = [True] * (stop - start)
        return ids, learn

    def _render(self, row: Row, messages: list[dict[str, Any]], ask: bool) -> str:
        """The chat as text; ask: with the prompt for the next answer at its end."""
        if not self.templated:
            turns = [
                PLAIN.format(role=m["role"].capitalize(), content=m["content"] + self.end * (m["role"] == ANSWER))
                for m in messages
            ]
            return "\n\n".join([*turns, PLAIN.format(role=ANSWER.capitalize(), content="")] if ask else turns)
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise LlmqError(f"{row.where}: the chat template refuses it ({first_line(error)}); mend the row") from error
        return text

    def _encode(self, text: str, special: bool) -> list[int]:
        """special: the text has its special tokens already."""
        ids = encode(text, self.tokenizer, special_tokens=not special)
        end = self.tokenizer.eos_token_id
        return ids[:-1] if end is not None and ids[-2:] == [end, end] else ids


def content(row: Row) -> str | tuple[list[dict[str, Any]], bool]:
    """A row's text, or its messages and whether they are a prompt and completion that may be joined without a layout.

    Raises LlmqError, with file and line, for a row that is neither.
    """
    fields = row.fields
    for name in CHAT:
        if name in fields:
            return _messages(row, name), False
    if "prompt" in fields or "completion" in fields:
        return _pair(_string(row, "prompt"), _string(row, "completion")), True
    if "instruction" in fields or "output" in fields:
        more = fields.get("input")
        question = _string(row, "instruction") + (f"\n\n{_string(row, 'input')}" if more else "")
        return _pair(question, _string(row, "output")), False
    if "text" in fields:
        return _string(row, "text")
    raise LlmqError(
        f"{row.where} has the columns {', '.join(map(str, fields)) or 'none'}: a row holds messages, "
        "prompt and completion, instruction and output, or text"
    )


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": ANSWER, "content": answer}]


def _string(row: Row, name: str) -> str:
    """A column that must be a text. Raises LlmqError."""
    if name not in row.fields:
        raise LlmqError(f"{row.where} has no {name!r}, only {', '.join(map(str, row.fields))}: add it")
    value = row.fields[name]
    if not isinstance(value, str):
        raise LlmqError(f"{row.where}: {name!r} is {type(value).__name__}, not a text: mend the row")
    if not value.strip():
        raise LlmqError(f"{row.where}: {name!r} is empty: mend the row, or take it out")
    return value


def _messages(row: Row, name: str) -> list[dict[str, Any]]:
    """The turns of a chat that has an answer. Raises LlmqError."""
    messages = chat_messages(row.fields[name])
    if messages is None or not all(isinstance(m["content"], str) for m in messages):
        raise LlmqError(f"{row.where}: {name!r} must be a list of {{'role': …, 'content': text}}: mend the row")
    if not any(m["role"] == ANSWER and m["content"].strip() for m in messages):
        raise LlmqError(f"{row.where}: {name!r} has no answer (role {ANSWER!r}) to learn: add one, or take it out")
    return messages


def _common(one: list[int], other: list[int]) -> int:
    """The length of the longest common prefix, in tokens."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def joined(examples: Examples, between: list[int]) -> Iterator[int]:
    """The tokens of all examples in a row; `between` is added after each example that does not end with it."""
    for example in examples.all:
        yield from example.ids
        if list(example.ids[-len(between) :]) != between:
            yield from between
