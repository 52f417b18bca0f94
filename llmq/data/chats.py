"""Chats: lists of messages as a chat template takes them, and their text with nothing lost on the way.

A message goes to the template whole, with every key that it has (tool calls, names, reasoning). Three things are made
uniform: a null means that a key is missing, but for the content; text parts are one text; JSON that is stored as text
(a whole chat, `tools`, `tool_calls`) is parsed. Templates differ in what they take beyond that, so a text in which
something of the chat is missing is rendered again with other forms of the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llmq.errors import LlmqError, first_line

CHAT = ("messages", "conversations")
ANSWER = "assistant"
_ROLES = {"human": "user", "gpt": ANSWER, "chatgpt": ANSWER, "bot": ANSWER, "observation": "tool"}
_CALL = "function_call"
"""In ShareGPT's spelling the role of a turn whose value is a call, elsewhere a key of a message."""
_CALLS = ("tool_calls", _CALL)
_TURNS = {"human": "user", ANSWER: ANSWER}
"""Keys of two turns in one object, as ms-swift has them."""
_MEDIA = re.compile(r"(image|video|audio)s?")
"""Columns beside a text that hold what it speaks of, as data sets for vision-language models have them."""
_LIST = re.compile(r"\s*\[\s*\{")
_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and in the form that gave it. hidden: what the template does not show, in words."""

    messages: Messages
    text: str
    hidden: tuple[str, ...]


class TemplateRefusal(Exception):
    """The chat template has raised an error; its first line."""


def chat_messages(value: Any) -> Messages | None:
    """Messages with a role and a content or calls, of either common spelling, or of their JSON; None for all else."""
    if isinstance(value, str):
        value = _parsed(value) if _LIST.match(value) else None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return None
    if all(item.keys() == _TURNS.keys() for item in value):
        value = [{"role": role, "content": item[key]} for item in value for key, role in _TURNS.items()]
    messages = []
    for item in value:
        sharegpt = "role" not in item and "from" in item
        role = item.get("from" if sharegpt else "role")
        content = "value" if sharegpt else "content"
        if not isinstance(role, str) or not any(key in item for key in (content, *_CALLS)):
            return None
        message: dict[str, Any] = {"role": _ROLES.get(role, role)}
        for key, held in item.items():
            if key == content:
                message["content"] = held
            elif held is not None and key != ("from" if sharegpt else "role"):
                message[key] = held
        if sharegpt and role == _CALL:
            message = _call_of(message)
        messages.append(message)
    return messages


def _call_of(message: dict[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT's whose value is a call in JSON, as an answer with tool calls; unchanged if it is none."""
    call = _parsed(message.get("content"))
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(one, dict) and "name" in one for one in calls):
        return message
    made = [{"type": "function", "function": one} for one in calls]
    return message | {"role": ANSWER, "content": None, "tool_calls": made}


def is_repr(value: str) -> bool:
    """Whether a text looks like a list of messages that is not JSON, such as Python's own form of it."""
    return bool(_AS_TEXT.match(value)) and chat_messages(value) is None


def _parsed(text: Any) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def clean(messages: Messages, where: str) -> Messages:
    """Messages whose content is a text or null: text parts are joined. Raises LlmqError, with `where`, at any other."""
    made = []
    for number, message in enumerate(messages, 1):
        at = f"{where}: message {number} ({message['role']})"
        message = dict(message)
        if message["role"] == _CALL:
            raise LlmqError(f"{at} is no call in JSON with a name: mend the row, or take it out")
        if isinstance(message.get("content"), list):
            message["content"] = "".join(_part(part, at) for part in message["content"])
        content = message.get("content")
        if not isinstance(content, str | None):
            raise LlmqError(f"{at} has a content of type {type(content).__name__}: give a text or a list of text parts")
        if isinstance(message.get("tool_calls"), str):
            message["tool_calls"] = _parsed(message["tool_calls"])
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise LlmqError(f"{at} has tool_calls that are no list of objects: mend the row, or take it out")
        made.append(message)
    _check_characters([messages], where)
    return made


def _part(part: Any, at: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
    if isinstance(text, str) and str(kind).endswith("text"):
        return text
    raise LlmqError(f"{at} has a part of type {kind!r}, and only text can be read: take the part or the row out")


def _check_characters(value: Any, where: str) -> None:
    for text in _strings(value):
        check_text(text, where)


def check_text(text: str, where: str) -> None:
    """Raise LlmqError for half of a character, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LlmqError(f"{where} holds half of a character (\\u{ord(text[error.start]):x}): mend the row") from error


def check_media(fields: Mapping[str, Any], where: str, way: str) -> None:
    """Raise LlmqError for a row with an image, a video or a sound, which only its text would be read of.

    way: what to do besides taking out the row.
    """
    if found := next((name for name, held in fields.items() if _MEDIA.fullmatch(name) and held), None):
        raise LlmqError(
            f"{where} has a column {found!r}, and only text is read, in which a placeholder would stand for it: give "
            f"rows of text{way}"
        )


def with_system(messages: Messages, fields: Mapping[str, Any]) -> Messages:
    """The messages, after the row's own `system` if that is a text and they have no such message."""
    system = fields.get("system")
    if not isinstance(system, str) or not system.strip() or any(m["role"] == "system" for m in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _as_tool(value: Any) -> Any:
    """A function's description alone, as older rows have it, as a tool."""
    bare = isinstance(value, Mapping) and "name" in value and "function" not in value and "type" not in value
    return {"type": "function", "function": value} if bare else value


def tools_of(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """The row's tools, from a list or its JSON; None if it has none. Raises LlmqError, with `where`, for all else."""
    older = not fields.get("tools")
    value = fields.get("functions" if older else "tools")
    if isinstance(value, str):
        parsed = _parsed(value.strip() or "[]")
        value = value if parsed is None else parsed
    if isinstance(value, list):
        value = [_parsed(tool) or tool for tool in value]
        value = [_as_tool(tool) for tool in value] if older else value
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise LlmqError(f"{where}: 'tools' is no list of tools in JSON: mend the row, or rename the column")
    return value


def apply_template(tokenizer: Any, messages: Messages, tools: list[Any] | None, ask: bool = False) -> str:
    """The chat as text; ask: with the prompt for the next answer at its end. Raises TemplateRefusal."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program of the checkpoint's
        raise TemplateRefusal(first_line(error)) from error
    return text


def render(tokenizer: Any, messages: Messages, tools: list[Any] | None) -> Rendered:
    """The chat by the tokenizer's template, in the first form in which it shows most of the chat.

    messages: from `clean`. They are rendered as they are, and if that loses something: with "" for null, with contents
    as lists of parts, with the calls' arguments as objects or as JSON texts. Raises TemplateRefusal if it takes none.
    """
    best: Rendered | None = None
    fewest = 0
    refusal: TemplateRefusal | None = None
    for form in _forms(messages):
        try:
            text = apply_template(tokenizer, form, tools)
        except TemplateRefusal as error:
            refusal = refusal or error
            continue
        calls = any(name not in text for message in messages for name in call_names(message))
        lost = _lost(messages, text) + calls
        if best is None or lost < fewest:
            best, fewest = Rendered(form, text, ("tool calls",) * calls), lost
        if not lost:
            break
    if best is None:
        raise refusal or TemplateRefusal("it gives no text")
    silent = [{key: held for key, held in message.items() if key not in _CALLS} for message in best.messages]
    hidden = [*best.hidden]
    made = any(message.get(key) for message in best.messages for key in _CALLS)
    if made and not hidden and _same_text(tokenizer, silent, tools, best.text):
        hidden.append("tool calls")
    if tools and _same_text(tokenizer, best.messages, None, best.text):
        hidden.append("list of tools")
    return replace(best, hidden=tuple(hidden))


def _same_text(tokenizer: Any, messages: Messages, tools: list[Any] | None, text: str) -> bool:
    """Whether a chat with less in it gives the same text."""
    try:
        return apply_template(tokenizer, messages, tools) == text
    except TemplateRefusal:
        return False


def _forms(messages: Messages) -> Iterator[Messages]:
    """The messages as they are, then each other form."""
    seen: list[Messages] = []
    for content, arguments in product((_same, _no_null, _in_parts), (_same, _as_object, _as_json)):
        form = []
        for message in messages:
            message = dict(message)
            if "content" in message:
                message["content"] = content(message["content"])
            if message.get("tool_calls"):
                message["tool_calls"] = [_with_arguments(call, arguments) for call in message["tool_calls"]]
            form.append(message)
        if form not in seen:
            seen.append(form)
            yield form


def _same(value: Any) -> Any:
    return value


def _no_null(content: str | None) -> str:
    return content or ""


def _in_parts(content: str | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": content or ""}]


def _as_object(arguments: Any) -> Any:
    parsed = _parsed(arguments)
    return parsed if isinstance(parsed, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(call: Mapping[str, Any], change: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else dict(call)


def call_names(message: Mapping[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    calls = [*(message.get("tool_calls") or []), *([message[_CALL]] if isinstance(message.get(_CALL), dict) else [])]
    names = [(call["function"] if isinstance(call.get("function"), Mapping) else call).get("name") for call in calls]
    return [name for name in names if isinstance(name, str)]


def _lost(messages: Messages, text: str) -> int:
    """How many contents are missing in the text, nulls are the word None, arguments are quoted a second time."""
    contents = [message.get("content") for message in messages]
    lost = sum(content.strip() not in text for content in contents if content)
    if None in contents:
        lost += text.count("None") > sum(held.count("None") for held in _strings([messages]))
    for held in _strings([[message.get("tool_calls") for message in messages]]):
        lost += held not in text and json.dumps(held, ensure_ascii=False)[1:-1] in text and '"' in held
    return lost


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _strings(key)
            yield from _strings(held)
    elif isinstance(value, list):
        for held in value:
            yield from _strings(held)
