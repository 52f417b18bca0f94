"""Training rows, and which of their tokens are the answer: the loss is taken on those only.

A row has one of these forms, tried in this order:

    {"messages": [{"role": …, "content": …}, …]}    a chat, in a column of any name; every answer of the assistant that
                                                    says or calls something is learned, calls as the template shows
                                                    them, but for those with "weight": 0 (or "train": false …)
    {"prompt": …, "completion": …}                  a question and its answer, texts or messages
    {"prompt": …, "chosen": …, "rejected": …}       preference data: the chosen answer is learned, never the other
    {"instruction": …, "input": …, "output": …}     the same, "input" may be missing or empty
    {"text": …}                                     a plain text; all of it is learned

All but the last go through the tokenizer's chat template where it has one, with the row's "tools" where it has them.
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

from llmq.data import answers, chats
from llmq.data.answers import CHOSEN, REJECTED
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
MARKS = ("weight", "loss_weight", "loss", "train", "training")
"""Keys of a message that say whether it is learned: of OpenAI's files, and of trainers that document one."""
DETAILS = ("train_detail", "training_detail")
"""Keys that say so of parts of it."""


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
    Raises LlmqError, with file and line, at a row that has none of these forms, and if there is nothing to learn.
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
        lost += bool(ids) and not any(learn[:seqlen][1:])
    if not count:
        raise LlmqError(
            f"{WHAT} {file} is empty: one row on each line of a .jsonl, such as {{'prompt': …, 'completion': …}}"
        )
    told = [
        f"{WHAT} {file}: {text} ({len(where)} row{'s' * (len(where) > 1)}, first {where[0]})"
        for text, where in layout.told.items()
    ]
    if not found and not lost:
        raise LlmqError(
            "; ".join([*told, "so there is nothing to learn: give rows with answers that are to be learned"])
        )
    if not found:
        raise LlmqError(f"{WHAT} {file}: none of its {count} rows has an answer within {seqlen} tokens: raise --seqlen")
    if cut or lost:
        cuts = f"{cut} of {count} rows were cut to {seqlen} tokens, {lost} of them left no answer"
        told.insert(0, f"{WHAT} {file}: {cuts}")
    return Examples(tuple(found), tuple(told))


class _Layout:
    """Turns a row into tokens."""

    def __init__(self, tokenizer: Any, templated: bool) -> None:
        self.tokenizer = tokenizer
        self.templated = templated
        self.end: str = tokenizer.eos_token or ""
        self.told: dict[str, list[str]] = {}

    def note(self, told: str, row: Row) -> None:
        """Add a row to those of which this is told."""
        self.told.setdefault(told, []).append(row.where)

    def tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """Ids and, for each, whether it is learned; none if the row is left out. Raises LlmqError naming the row."""
        what = content(row)
        label = "" if isinstance(what, str) else answers.label(row.fields)
        if label == "false":
            self.note("rows whose label is false are left out", row)
            return [], []
        if label in ("0", "0.0") and "completion" in row.fields:
            self.note("rows whose label is 0 are learned, as only false says that an answer is not wanted", row)
        plain = isinstance(what, str) and isinstance(row.fields.get("text"), str)
        if worse := [name for name in REJECTED if row.fields.get(name) is not None and not plain]:
            self.note(f"the better answers are learned, never {', '.join(map(repr, worse))}", row)
        if isinstance(what, str):
            if not plain:
                self.note("texts are learned whole, as no column with their prompts is known", row)
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
        if any(message["role"] != ANSWER and any(message.get(key) for key in MARKS) for message in messages):
            self.note("turns of other roles are marked to be learned, and only answers are", row)
        if not any(_speaks(message) and _wanted(message) for message in messages):
            self.note("rows are left out whose answers are all marked as not to be learned", row)
            return [], []
        both = answers.joined(row.fields)
        tools = chats.tools_of(row.fields if both is None else both.fields, row.where)
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
                self.note("the chat template hides the list of tools", row)
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
            if not _wanted(messages[i]) or not _shown(messages[i], before, through):
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


def _wanted(message: dict[str, Any]) -> bool:
    """Whether no mark says that a turn is not to be learned."""
    return all(message.get(key, True) for key in MARKS)


def _check_marks(messages: Messages, where: str) -> None:
    """Raise LlmqError, with `where`, unless every mark of an answer is 0 or 1, false or true, for the whole of it."""
    for number, message in enumerate(messages, 1):
        at = f"{where}: message {number} ({message['role']})"
        for key in MARKS if message["role"] == ANSWER else ():
            value = message.get(key, 1)
            if not isinstance(value, int | float) or value not in (0, 1):
                raise LlmqError(
                    f"{at} has {key} {value!r}, and an answer is learned (1, true) or not (0, false): mend the row, or "
                    "take the key out"
                )
        detail = next((key for key in DETAILS if message["role"] == ANSWER and message.get(key)), None)
        if detail is not None:
            raise LlmqError(
                f"{at} has a {detail!r}, and an answer is learned as a whole or not at all: mark it with 'train', or "
                "take the key out"
            )


def _shown(message: dict[str, Any], before: str, through: str) -> bool:
    """Whether the text of an answer without content has the calls that it makes."""
    piece = through[len(commonprefix([before, through])) :]
    return bool(message.get("content")) or any(name in piece for name in call_names(message))


def content(row: Row) -> str | tuple[Messages, bool]:
    """A row's text, or its messages and whether they are a prompt and completion that may be joined without a layout.

    Raises LlmqError, with file and line, for a row that is neither.
    """
    fields = row.fields
    chats.check_media(fields, row.where, "")
    both = answers.joined(fields)
    if both is not None:
        return _joined(row, both)
    for name in CHAT:
        if fields.get(name) is not None:
            return _messages(row, name), False
    found = [name for name, value in fields.items() if chat_messages(value)]
    beside = [name for name in ("completion", "output") if isinstance(fields.get(name), str)]
    better = [name for name in found if name not in REJECTED]
    if len([*better, *beside]) == 1 and better:
        return _messages(row, better[0]), False
    if better:
        several = ", ".join(map(repr, [*better, *beside]))
        raise LlmqError(f"{row.where} has answers in {several}: put the turns to learn into one list 'messages'")
    chosen = next((name for name in CHOSEN if name in fields), None)
    if chosen is not None and not beside and not isinstance(fields.get("text"), str):
        text = _string(row, chosen)
        turns = answers.marked_turns(text)
        return text if turns is None else (chats.with_system(turns, fields), False)
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


def _joined(row: Row, both: answers.Joined) -> tuple[Messages, bool]:
    """The messages of a prompt and its answer, of which only the answer is learned."""
    where = f"{row.where}: {both.name!r}"
    more = [name for name, held in both.rest.items() if name not in REJECTED and chat_messages(held)]
    if more or both.rest.get("history"):
        raise LlmqError(
            f"{where} has turns in {(more or ['history'])[0]!r} beside it: put all into one list 'messages'"
        )
    if isinstance(both.prompt, str) and isinstance(both.answer, str):
        for text, name in ((both.prompt, both.names[0]), (both.answer, both.names[-1])):
            _check(row, name, text)
        turns = answers.marked_turns(both.prompt + both.answer)
        given = 0 if turns is None else len(answers.MARK.findall(both.prompt.strip())) - 1
        if turns is not None:
            return chats.with_system(_as_context(turns[:given]) + turns[given:], row.fields), False
        messages = _pair(both.prompt, both.answer)
        whole = chats.with_system(messages, row.fields)
        return whole, whole is messages
    assert not isinstance(both.prompt, str) and not isinstance(both.answer, str)
    parts = [chats.clean(part, where) for part in (both.prompt, both.answer)]
    _check_marks(parts[1], where)
    if not any(map(_speaks, parts[1])):
        raise LlmqError(f"{where} has no answer (role {ANSWER!r}) to learn: add one, or take it out")
    return chats.with_system(_as_context(parts[0]) + parts[1], row.fields), False


def _as_context(messages: Messages) -> Messages:
    """Messages of which none is learned."""
    return [{**message, MARKS[0]: 0} for message in messages]


def _pair(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": ANSWER, "content": answer}]


def _string(row: Row, name: str) -> str:
    """A column that must be a text. Raises LlmqError."""
    if name not in row.fields:
        raise LlmqError(f"{row.where} has no {name!r}, only {', '.join(map(str, row.fields))}: add it")
    return _check(row, name, row.fields[name])


def _check(row: Row, name: str, value: Any) -> str:
    """The value of a column that must be a text. Raises LlmqError."""
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
    _check_marks(messages, f"{row.where}: {name!r}")
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
