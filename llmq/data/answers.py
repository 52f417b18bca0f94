"""Rows whose prompt and answer are in columns of their own: prompt and completion, and those of preference data.

Such rows have a better and a worse answer ("chosen" and "rejected" in TRL, "preferred_output" and
"non_preferred_output" in OpenAI's), or one answer with a label that says whether it is wanted (KTO). The worse answer
is never taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.data.chats import ANSWER, CHAT, Messages, chat_messages

CHOSEN = ("chosen", "preferred_output")
REJECTED = ("rejected", "non_preferred_output", "rejected_response")
COMPLETION = "completion"
PLUS = " + "
_PROMPTS = ("prompt", "question", "instruction", "query")
LABELS = ("label", "kto_tag")
MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")
"""The start of a turn in a text that is a chat, as in Anthropic's hh-rlhf."""


@dataclass(frozen=True)
class Joined:
    """A prompt and its answer: both texts, one the continuation of the other, or both messages.

    names: the columns that they were in. rest: the row's other columns. The prompt is empty if it is in the answer.
    """

    prompt: Messages | str
    answer: Messages | str
    names: tuple[str, ...]
    rest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The columns in words, the same for every row of a file."""
        return self.names[0] + PLUS + self.names[-1]

    @property
    def fields(self) -> dict[str, Any]:
        """The row with prompt and answer in one column, `name`: a text or a chat."""
        if isinstance(self.prompt, str) or isinstance(self.answer, str):
            return {self.name: f"{self.prompt}{self.answer}", **self.rest}
        return {self.name: [*self.prompt, *self.answer], **self.rest}


def joined(fields: Mapping[str, Any]) -> Joined | None:
    """A row's prompt and answer; None if they are not in columns of their own, or of other types than texts and chats.

    A row whose messages end with an answer has that.
    """
    name = next((name for name in (*CHOSEN, COMPLETION) if fields.get(name) is not None), None)
    if name is None:
        return None
    answer = _messages_or_text(fields[name])
    names, prompt, more = _prompt(fields, name)
    if not answer or prompt is None or prompt == []:
        return None
    rest = {**{key: held for key, held in fields.items() if key not in (*names, name)}, **more}
    names = (*names, name)
    if isinstance(prompt, str) and isinstance(answer, str):
        # A prompt that both answers begin with is in them already.
        worse = [value for key in REJECTED if isinstance(value := fields.get(key), str)]
        within = prompt and worse and all(text.startswith(prompt) for text in (answer, *worse))
        answer = answer[len(prompt) :] if within else answer
        if names[0] == _PROMPTS[0]:
            return Joined(prompt, answer, names, rest)
    if isinstance(answer, str):
        answer = [{"role": ANSWER, "content": answer}]
    if isinstance(prompt, str):
        own = any(message["role"] == "user" for message in answer)
        prompt = [] if own else [{"role": "user", "content": prompt}]
    elif [*map(_said, answer[: len(prompt)])] == [*map(_said, prompt)]:
        answer = answer[len(prompt) :]
    return Joined(prompt, answer, names, rest)


def _prompt(fields: Mapping[str, Any], answer: str) -> tuple[tuple[str, ...], Messages | str | None, dict[str, Any]]:
    """The prompt's columns, the prompt for the answer in that column, and columns that come with it."""
    for name in CHAT:
        if fields.get(name) is not None:
            messages = chat_messages(fields[name])
            return (name,), messages if messages and messages[-1]["role"] != ANSWER else None, {}
    for name in _PROMPTS[: 1 if answer == COMPLETION else None]:
        if fields.get(name) is None:
            continue
        prompt, more = _messages_or_text(fields[name]), fields.get("input")
        if name == "instruction" and isinstance(prompt, str) and isinstance(more, str) and more.strip():
            return (name, "input"), f"{prompt}\n\n{more}", {}
        return (name,), prompt, {}
    asked: Any = fields.get("input")
    more = {}
    if isinstance(asked, Mapping):
        more = {key: held for key, held in asked.items() if key != CHAT[0]}
        asked = asked.get(CHAT[0])
    return ("input",), _messages_or_text(asked) if answer in CHOSEN else None, more


def _messages_or_text(value: Any) -> Messages | str | None:
    """A chat, one message as a chat, or a text; None for all else."""
    messages = chat_messages([value] if isinstance(value, Mapping) else value)
    return messages if messages is not None else value if isinstance(value, str) else None


def _said(message: Mapping[str, Any]) -> tuple[Any, Any]:
    return message["role"], message.get("content")


def label(fields: Mapping[str, Any]) -> str:
    """What a row's label says of its answer, in small letters: false if that is not wanted. Empty without a label."""
    return next((str(fields[name]).lower() for name in LABELS if fields.get(name) is not None), "")


def marked_turns(text: str) -> Messages | None:
    """The turns of a text that is a chat with 'Human:' or 'Assistant:' before each; None if it is no such text."""
    start, *pieces = MARK.split(text.strip())
    if start or not pieces or pieces[0] != "Human" or ANSWER.capitalize() not in pieces[::2]:
        return None
    roles = {"Human": "user"}
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": roles.get(who, ANSWER), "content": said.strip()} for who, said in turns]
