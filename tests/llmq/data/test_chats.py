"""Chats through templates of several kinds: nothing is lost on the way, or it is said what the template hides."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from llmq.data.chats import TemplateRefusal, call_names, chat_messages, clean, is_repr, render, tools_of, with_system
from tests.llmq.data.made import TOOL_TEMPLATE
from tests.llmq.refusal import refused

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def made(bpe: Any, template: str) -> Any:
    tokenizer = deepcopy(bpe)
    tokenizer.chat_template = template
    return tokenizer


def called(arguments: Any, content: str | None = None) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "user", "content": "Paris?"}, {"role": "assistant", "content": content, "tool_calls": [call]}]


def test_a_message_keeps_all_its_keys_but_nulls() -> None:
    message = {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": None,
        "name": "b",
        "tool_calls": [{"id": "1"}],
    }
    assert chat_messages([message | {"audio": None, "refusal": None}]) == [message]
    assert chat_messages(json.dumps([message])) == [message]
    assert chat_messages([{"from": "gpt", "value": "noon", "weight": 1}]) == [
        {"role": "assistant", "content": "noon", "weight": 1}
    ]


@pytest.mark.parametrize("text", ["see", "[see]", "[]", '[{"a": 1}]', "[{'role': 'user', 'content': 'see'}]", "[{"])
def test_other_texts_are_no_chats(text: str) -> None:
    assert not chat_messages(text)
    assert is_repr(text) == ("'role'" in text)


def test_what_the_template_shows_whole_is_rendered_once_and_as_it_is(bpe: Any) -> None:
    tokenizer, messages = made(bpe, TOOL_TEMPLATE), called({"city": "Paris"}, "")
    found = render(tokenizer, messages, TOOLS)
    assert found.messages == messages and not found.hidden
    assert found.text == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        # null printed, a JSON text quoted once more: as most do
        ("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"),
        # a text is expected, an object raises
        (
            "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
            "{{ c.function.name + c.function.arguments }}{% endfor %}"
        ),
        # null raises
        ("{{ m.content + ';' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"),
    ],
)
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_null_and_arguments_in_the_form_that_the_template_takes(bpe: Any, template: str, arguments: Any) -> None:
    found = render(made(bpe, "{% for m in messages %}" + template + "{% endfor %}"), called(arguments), None)
    assert '{"city": "Paris"}' in found.text and "None" not in found.text and "\\" not in found.text
    assert found.text.startswith("Paris?") and not found.hidden


def test_a_template_for_parts_gets_parts(bpe: Any) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
    assert render(made(bpe, template), [{"role": "user", "content": "see"}], None).text == "see;"


def test_what_a_template_hides_is_told(bpe: Any) -> None:
    blind = made(bpe, "{% for m in messages %}{{ m.content }};{% endfor %}")
    assert render(blind, called({"city": "Paris"}, "the weather"), TOOLS).hidden == ("tool calls", "list of tools")
    offers = made(bpe, "{{ tools | tojson }}{% for m in messages %}{{ m.content }};{% endfor %}")
    assert render(offers, called({"city": "Paris"}, ""), TOOLS).hidden == ("tool calls",)
    assert not render(made(bpe, TOOL_TEMPLATE), called({}, "see"), TOOLS).hidden


def test_the_first_form_is_taken_where_no_form_shows_all(bpe: Any) -> None:
    """As in templates that leave earlier thoughts out."""
    template = "{% for m in messages %}{{ (m.content or '').split('</think>')[-1] }};{% endfor %}"
    messages = [{"role": "assistant", "content": "<think>hm</think>noon"}, {"role": "user", "content": None}]
    found = render(made(bpe, template), messages, None)
    assert (found.text, found.messages) == ("noon;;", messages)


def test_a_refusal_is_that_of_the_messages_as_they_are(bpe: Any) -> None:
    template = "{{ raise_exception('other' if messages[0].content is string else 'null') }}"
    with pytest.raises(TemplateRefusal, match="null$"):
        render(made(bpe, template), [{"role": "user", "content": None}], None)


def test_content_is_text(bpe: Any) -> None:
    def content(value: Any) -> Any:
        return clean([{"role": "user", "content": value}], "a:3")[0]["content"]

    assert [content(v) for v in ("see", None, [], ["s", {"text": "ee"}])] == ["see", None, "", "see"]
    assert content([{"type": "output_text", "text": "no"}, {"type": "text", "text": "on"}]) == "noon"
    for other, words in (
        (5, "type int"),
        ([5], "'int'"),
        ([{"type": "text"}], "'text'"),
        ([{"type": "image"}], "'image'"),
    ):
        refused(lambda other=other: content(other), "a:3: message 1 (user) has", words)  # type: ignore[misc]


def test_tools_are_a_list_of_objects() -> None:
    for value in (TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
        assert tools_of({"tools": value}, "a:3") == TOOLS
    for value in (None, "", " ", [], "[]"):
        assert tools_of({"tools": value}, "a:3") is None
    assert tools_of({}, "a:3") is None
    for value in ("hammer", 5, {"name": "weather"}, ["weather"], "{"):
        refused(lambda value=value: tools_of({"tools": value}, "a:3"), "a:3: 'tools'")  # type: ignore[misc]


def test_names_of_calls_in_every_form() -> None:
    assert call_names({"tool_calls": [{"function": {"name": "a"}}, {"name": "b"}], "function_call": {"name": "c"}}) == [
        *"abc"
    ]
    assert call_names({"role": "user", "content": "see"}) == [] and call_names({"tool_calls": [{"id": 1}]}) == []


def test_a_rows_own_system_message_is_the_first() -> None:
    user = [{"role": "user", "content": "see"}]
    assert with_system(user, {"system": "Rhyme."}) == [{"role": "system", "content": "Rhyme."}, *user]
    own = [{"role": "system", "content": "own"}, *user]
    others: list[tuple[Any, dict[str, Any]]] = [(own, {"system": "Rhyme."}), (user, {"system": " "}), (user, {})]
    for same, fields in [*others, (user, {"system": None})]:
        assert with_system(same, fields) == same


def test_functions_of_older_rows_are_tools() -> None:
    bare = {"name": "f", "parameters": {}}
    assert tools_of({"functions": [bare]}, "a:1") == [{"type": "function", "function": bare}]
    assert tools_of({"tools": [bare], "functions": [1]}, "a:1") == [bare]
    assert tools_of({"functions": None}, "a:1") is None
