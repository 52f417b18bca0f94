"""Training rows, and which of their tokens are the answer: the loss is taken on those only.

A row has one of these forms, tried in this order:

    {"messages": [{"role": …, "content": …}, …]}    a chat, in a column of any name; every answer of the assistant that
                                                    says or calls something is learned, calls as the template shows them
    {"prompt": …, "completion": …}                  a question and its answer
    {"instruction": …, "input": …, "output": …}     the same, "input" may be missing or empty
    {"text": …}                                     a plain text; all of it is learned

The first three go through the tokenizer's chat template where it has one, with the row's "tools" where it has them.
Where it has none, or with template="none", a chat and an instruction are laid out as `PLAIN` says, and a prompt and its
completion are joined as they are; the end-of-text token follows each answer. The begin and end of an answer are found
by rendering and tokenizing the row up to that point and comparing with the whole row, so neither marks in the template
nor a tokenizer with offsets are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path
from typing import Any

from llmq.data import chats
from llmq.data.chats import ANSWER, CHAT, Messages, TemplateRefusal, apply_template, call_names, chat_messages
from llmq.data.files import ENDINGS, Row, rows_of
from llmq.data.opened import suffix
from llmq.data.tokens import encode
from llmq.errors import LlmqError

PLAIN = "### {role}:\n{content}"
"""A turn without a chat template, its role capitalized; a blank line between turns. The prompt for an answer ends with
the first line of its turn.
"""
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
    """Every row of a .json, .jsonl, .csv or .parquet file as examples of at most `seqlen` tokens.

    An instruction that is too long is truncated at its end, and left out if that removes the whole answer; a text that
    is too long becomes several examples. template: auto or none.
    Raises LlmqError, with file and line, at a row that has none of the four forms, and if there is no row at all.
    """
    file = file.expanduser()
    if not file.is_file():
        raise LlmqError(f"{WHAT} {file}: no such file; give a .jsonl with one row on each line")
    if suffix(file) not in ENDINGS:
        raise LlmqError(f"{WHAT} {file}: give a .jsonl with one row on each line, or a .json, .csv or .parquet file")
    templated = template == "auto" and bool(getattr(tokenizer, "chat_template", None))
    layout = _Layout(tokenizer, templated)
    found: list[Example] = []
    count = cut = lost = 0
    for number, row in enumerate(rows_of(file, suffix(file), WHAT)):
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
        raise LlmqError(
            f"{WHAT} {file} is empty: one row on each line of a .jsonl, such as {{'prompt': …, 'completion': …}}"
        )
    if not found:
        raise LlmqError(f"{WHAT} {file}: none of its {count} rows has an answer within {seqlen} tokens: raise --seqlen")
    notes = []
    if cut or lost:
        notes.append(f"{WHAT} {file}: {cut} of {count} rows were cut to {seqlen} tokens, {lost} of them left no answer")
    if layout.hidden:
        where, count = layout.hidden[0], len(layout.hidden)
        notes.append(f"{WHAT} {file}: the chat template hides the list of tools of {count} rows (first {where})")
    return Examples(tuple(found), tuple(notes))


class _Layout:
    """Turns a row into tokens."""

    def __init__(self, tokenizer: Any, templated: bool) -> None:
        self.tokenizer = tokenizer
        self.templated = templated
        self.end: str = tokenizer.eos_token or ""
        self.hidden: list[str] = []

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

    def _chat(self, row: Row, messages: Messages) -> tuple[list[int], list[bool]]:
        tools = chats.tools_of(row.fields, row.where)
        if self.templated:
            try:
                made = chats.render(self.tokenizer, messages, tools)
            except TemplateRefusal as error:
                raise _refused(row, error) from error
            messages, whole = made.messages, made.text
            if "tool calls" in made.hidden:
                raise LlmqError(
                    f"{row.where}: the chat template does not show its tool calls, so they cannot be learned: take the "
                    "row out, or train a model whose template has them"
                )
            if made.hidden:
                self.hidden.append(row.where)
        elif tools or any(map(call_names, messages)):
            raise LlmqError(
                f"{row.where} has tools or tool calls, and only a chat template says how they are written: "
                "take the row out, or train a model whose tokenizer has a template, without --template none"
            )
        else:
            whole = self._render(row, messages, tools, False)
        ids = self._encode(whole, self.templated)
        learn = [False] * len(ids)
        turns = [i for i, message in enumerate(messages) if _speaks(message)]
        for i in turns:
            before = self._render(row, messages[:i], tools, True) if i else ""
            through = self._render(row, messages[: i + 1], tools, False)
            if not _shown(messages[i], before, through):
                continue
            # Some templates render earlier answers differently from the last one: such earlier answers are not learned.
            if i == turns[-1] or (whole.startswith(before) and whole.startswith(through)):
                start, stop = (_common(self._encode(t, self.templated), ids) for t in (before, through))
                learn[start:stop] = [True] * (stop - start)
        return ids, learn

    def _render(self, row: Row, messages: Messages, tools: list[Any] | None, ask: bool) -> str:
        """The chat as text; ask: with the prompt for the next answer at its end."""
        if not self.templated:
            turns = [
                PLAIN.format(
                    role=m["role"].capitalize(), content=(m.get("content") or "") + self.end * (m["role"] == ANSWER)
                )
                for m in messages
            ]
            return "\n\n".join([*turns, PLAIN.format(role=ANSWER.capitalize(), content="")] if ask else turns)
        try:
            return apply_template(self.tokenizer, messages, tools, ask)
        except TemplateRefusal as error:
            raise _refused(row, error) from error

    def _encode(self, text: str, special: bool) -> list[int]:
        """special: the text has its special tokens already."""
        ids = encode(text, self.tokenizer, special_tokens=not special)
        end = self.tokenizer.eos_token_id
        return ids[:-1] if end is not None and ids[-2:] == [end, end] else ids


def _refused(row: Row, error: TemplateRefusal) -> LlmqError:
    return LlmqError(f"{row.where}: the chat template refuses it ({error}); mend the row, or take it out")


def _speaks(message: dict[str, Any]) -> bool:
    """Whether a turn is an answer that says or calls something: an empty one is never learned."""
    said = message.get("content")
    said = said[0]["text"] if isinstance(said, list) else said
    return message["role"] == ANSWER and bool((said or "").strip() or call_names(message))


def _shown(message: dict[str, Any], before: str, through: str) -> bool:
    """Whether the text of an answer without content has the calls that it makes."""
    piece = through[len(commonprefix([before, through])) :]
    return bool(message.get("content")) or any(name in piece for name in call_names(message))


def content(row: Row) -> str | tuple[Messages, bool]:
    """A row's text, or its messages and whether they are a prompt and completion that may be joined without a layout.

    Raises LlmqError, with file and line, for a row that is neither.
    """
    fields = row.fields
    for name in CHAT:
        if fields.get(name) is not None:
            return _messages(row, name), False
    found = [name for name, value in fields.items() if chat_messages(value)]
    beside = [name for name in ("completion", "output") if isinstance(fields.get(name), str)]
    if len([*found, *beside]) == 1 and found:
        return _messages(row, found[0]), False
    if found:
        several = ", ".join(map(repr, [*found, *beside]))
        raise LlmqError(f"{row.where} has answers in {several}: put the turns to learn into one list 'messages'")
    if "prompt" in fields or "completion" in fields:
        return _pair(_string(row, "prompt"), _string(row, "completion")), True
    if "instruction" in fields or "output" in fields:
        more = fields.get("input")
        question = _string(row, "instruction") + (f"\n\n{_string(row, 'input')}" if more else "")
        if fields.get("history"):
            raise LlmqError(
                f"{row.where} has a 'history', whose turns would be lost: put all turns into one list 'messages'"
            )
        return chats.with_system(_pair(question, _string(row, "output")), fields), False
    if "text" in fields:
        return _string(row, "text")
    raise LlmqError(
        f"{row.where} has the columns {', '.join(map(str, fields)) or 'none'}: a row holds messages, "
        "prompt and completion, instruction and output, or text"
    )


def _pair(question: str, answer: str) -> Messages:
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
    chats.check_text(value, f"{row.where}: {name!r}")
    return value


def _messages(row: Row, name: str) -> Messages:
    """The turns of a chat that has an answer. Raises LlmqError."""
    messages = chat_messages(row.fields[name])
    if messages is None:
        raise LlmqError(f"{row.where}: {name!r} must be a list of {{'role': …, 'content': text}}: mend the row")
    messages = chats.with_system(messages, row.fields)
    messages = chats.clean(messages, f"{row.where}: {name!r} must be a list of {{'role': …, 'content': text}}")
    if not any(map(_speaks, messages)):
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
