"""Which tokens of a row are learned, for every kind of row, with and without a chat template; and broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmq.data.instructions import read
from tests.llmq.data.learned import CALLED, CHAT, SAID, TOOL, caller, chat, plain, shown, write
from tests.llmq.refusal import refused

__all__ = ["caller", "chat", "plain"]


@pytest.mark.parametrize(
    ("row", "whole", "learned"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4~", "4~"),
        ({"text": "a b"}, "a b~", "a b~"),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            "### User:\nAdd.\n\n2 2\n\n### Assistant:\n4~",
            "4~",
        ),
        (
            CHAT,
            "### System:\nBe brief.\n\n### User:\nOne?\n\n### Assistant:\nUn.~\n\n### User:\nTwo?\n\n"
            "### Assistant:\nDeux.~",
            "Un.~Deux.~",
        ),
    ],
)
def test_without_a_template(tmp_path: Path, plain: Any, row: object, whole: str, learned: str) -> None:
    (example,) = read(write(tmp_path, row), plain, seqlen=500).all
    assert shown(example, plain) == (whole, learned)


@pytest.mark.parametrize(
    ("row", "whole", "learned"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "<user>2+2=</user><assistant>4</assistant>", "4</assistant>"),
        ({"instruction": "Add.", "output": "4"}, "<user>Add.</user><assistant>4</assistant>", "4</assistant>"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            "<user>Hi</user><assistant>Ho</assistant>",
            "Ho</assistant>",
        ),
        (
            CHAT,
            "<system>Be brief.</system><user>One?</user><assistant>Un.</assistant><user>Two?</user>"
            "<assistant>Deux.</assistant>",
            "Un.</assistant>Deux.</assistant>",
        ),
    ],
)
def test_with_a_template(tmp_path: Path, chat: Any, row: object, whole: str, learned: str) -> None:
    (example,) = read(write(tmp_path, row), chat, seqlen=500).all
    assert shown(example, chat) == (whole, learned)


def test_template_none_joins_prompt_and_completion(tmp_path: Path, chat: Any) -> None:
    (example,) = read(write(tmp_path, {"prompt": "ab", "completion": "cd"}), chat, seqlen=500, template="none").all
    assert shown(example, chat) == ("abcd", "cd")


def test_a_template_that_shows_earlier_answers_otherwise(tmp_path: Path, chat: Any) -> None:
    """As reasoning templates do: only what stands as it was asked for is learned."""
    from copy import deepcopy

    tokenizer = deepcopy(chat)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role != 'assistant' %}{{ m.content }}"
        "{% else %}...{% endif %}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (example,) = read(write(tmp_path, CHAT), tokenizer, seqlen=500).all
    assert shown(example, tokenizer)[1] == "Deux.</assistant>"


def test_long_rows(tmp_path: Path, plain: Any) -> None:
    """A text is cut into pieces, an answer at its end; a row whose answer is out of reach is left out, with a note."""
    rows = [
        {"text": "x" * 25},
        {"prompt": "abcd", "completion": "y" * 20},
        {"prompt": "p" * 10, "completion": "z"},
    ]
    found = read(write(tmp_path, *rows), plain, seqlen=10)
    assert [shown(e, plain) for e in found.all] == [
        *[("x" * 10, "x" * 10)] * 2,
        ("xxxxx~", "xxxxx~"),
        ("abcdyyyyyy", "yyyyyy"),
    ]
    assert [e.row for e in found.all] == [0, 0, 0, 1]
    assert "2 of 3 rows were cut to 10 tokens, 1 of them left no answer" in found.notes[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "not JSON"),
        ('{"prompt": "a"}', "'completion'"),
        ('{"prompt": "a", "completion": 3}', "'completion' is int"),
        ('{"prompt": "a", "completion": " "}', "empty"),
        ('{"instruction": null, "output": "b"}', "'instruction'"),
        ('{"messages": "hello"}', "'messages' must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
        ('{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "'messages' must be a list"),
        ('{"question": "a"}', "question"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "no answer"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "name": "b"}]}',
            "no answer",
        ),
        (
            '{"one": [{"role": "assistant", "content": "a"}], "two": [{"role": "assistant", "content": "b"}]}',
            "answers in 'one', 'two': put",
        ),
        ('{"rejected": [{"role": "assistant", "content": "b"}]}', "has the columns rejected"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}',
            "no answer",
        ),
        ('{"prompt": "a", "rejected": "b"}', "'completion'"),
        ('{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "user", "content": "b"}]}', "no answer"),
        ('{"prompt": "a", "chosen": " ", "rejected": "b"}', "'chosen' is empty"),
        (
            '{"history": [{"role": "user", "content": "a"}], "prompt": "a", "completion": "b"}',
            "turns in 'history' beside it: put all into one list",
        ),
        ('{"history": [["a", "b"]], "instruction": "a", "chosen": "b"}', "turns in 'history'"),
        ('{"text": "\\ud83d"}', "half of a character"),
        ('{"image": "a.png", "prompt": "<image>", "completion": "a cat"}', "a column 'image', and only text is read"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "two values for 'prompt'"),
    ],
)
def test_a_broken_row_is_named_by_line(tmp_path: Path, plain: Any, line: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    refused(lambda: read(file, plain, seqlen=100), f"{file}:3", words)


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, chat: Any) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(chat)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    file = write(tmp_path, CHAT)
    refused(lambda: read(file, tokenizer, seqlen=100), f"{file}:1", "no system turn")


def turns(*changed: object, **more: object) -> dict[str, object]:
    """The chat above with its second turn changed."""
    return {"messages": [CALLED[0], *changed, *CALLED[2:]], **more}


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ({"messages": CALLED}, SAID + "Cold.\n"),
        ({"messages": CALLED, "tools": [TOOL]}, SAID + "Cold.\n"),
        ({"messages": json.dumps(CALLED), "tools": json.dumps([TOOL])}, SAID + "Cold.\n"),
        ({"messages": CALLED[:2]}, SAID),
        ({"text": "other", "dialogue": CALLED}, SAID + "Cold.\n"),
        (turns(CALLED[1] | {"content": "One moment."}), "One moment." + SAID + "Cold.\n"),
        (
            turns(CALLED[1] | {"content": [{"type": "text", "text": "One "}, {"type": "text", "text": "moment."}]}),
            "One moment." + SAID + "Cold.\n",
        ),
        (turns({"role": "assistant", "content": None}), "Cold.\n"),
        (turns({"role": "assistant", "content": "", "tool_calls": []}), "Cold.\n"),
        ({"messages": [*CALLED, {"role": "assistant", "content": " "}]}, SAID + "Cold.\n"),
    ],
)
def test_calls_are_learned_and_empty_turns_are_not(tmp_path: Path, caller: Any, row: Any, learned: str) -> None:
    (example,) = read(write(tmp_path, row), caller, seqlen=500).all
    whole, found = shown(example, caller)
    assert found == learned and "None" not in whole
    assert whole.startswith("<tools>") == ("tools" in row)


def test_two_calls_in_a_turn_and_arguments_as_json(tmp_path: Path, caller: Any) -> None:
    calls = [{"function": {"name": name, "arguments": '{"city": "Oslo"}'}} for name in ("weather", "time")]
    row = turns({"role": "assistant", "content": "", "tool_calls": calls})
    (example,) = read(write(tmp_path, row), caller, seqlen=500).all
    learned = '<call>weather{"city": "Oslo"}</call><call>time{"city": "Oslo"}</call>\nCold.\n'
    assert shown(example, caller)[1] == learned


def test_calls_that_are_not_shown_cannot_be_learned(tmp_path: Path, chat: Any, plain: Any) -> None:
    file = write(tmp_path, CHAT, {"messages": CALLED})
    refused(
        lambda: read(file, chat, seqlen=500), f"{file}:2: the chat template does not show its tool calls", "take the"
    )
    refused(lambda: read(file, plain, seqlen=500), f"{file}:2 has tools or tool calls", "take the row out")
    refused(lambda: read(file, chat, seqlen=500, template="none"), f"{file}:2 has tools", "without --template none")
    (note,) = read(write(tmp_path, CHAT | {"tools": [TOOL]}), chat, seqlen=500).notes
    assert f"hides the list of tools (1 row, first {file}:1)" in note


@pytest.mark.parametrize(
    ("name", "raw", "learned"),
    [
        ("a.json", json.dumps([{"prompt": "ab", "completion": "cd"}]), "cd~"),
        ("a.JSONL", '\ufeff{"prompt": "ab", "completion": "cd"}', "cd~"),
        ("a.csv", "prompt,completion\nab,007\n", "007~"),
        ("a.tsv", "instruction\toutput\nab\tNA\n", "NA~"),
    ],
)
def test_rows_of_every_format(tmp_path: Path, plain: Any, name: str, raw: str, learned: str) -> None:
    file = tmp_path / name
    file.write_text(raw, encoding="utf-8")
    (example,) = read(file, plain, seqlen=500).all
    assert shown(example, plain)[1] == learned


def test_nothing_to_learn_from(tmp_path: Path, plain: Any) -> None:
    refused(lambda: read(write(tmp_path), plain, seqlen=10), "rows.jsonl", "empty")
    refused(lambda: read(tmp_path / "none.jsonl", plain, seqlen=10), "none.jsonl", "no such file")
    for name in ("rows.csv", "rows.txt"):
        (tmp_path / name).write_text("a,b\n")
        refused(lambda name=name: read(tmp_path / name, plain, seqlen=10), name, ".jsonl")  # type: ignore[misc]
    long = write(tmp_path, {"prompt": "p" * 20, "completion": "c"})
    refused(lambda: read(long, plain, seqlen=10), "--seqlen")


def test_a_rows_own_system_text_is_laid_out_and_not_learned(tmp_path: Path, chat: Any) -> None:
    said = [("system", "Be brief."), ("user", "One?"), ("assistant", "Un.")]
    rows = [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Un."}]},
        {"system": "Be brief.", "instruction": "One?", "output": "Un."},
        {"messages": [{"role": role, "content": content} for role, content in said]},
    ]
    found = []
    for number, row in enumerate(rows):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row))
        (example,) = read(file, chat, seqlen=500).all
        found.append(shown(example, chat))
    assert found == [("<system>Be brief.</system><user>One?</user><assistant>Un.</assistant>", "Un.</assistant>")] * 3


def test_turns_before_an_instruction_are_not_dropped(tmp_path: Path, chat: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"instruction": "see", "output": "noon", "history": [["a", "b"]]}))
    refused(lambda: read(file, chat, seqlen=64), "a.jsonl:1 has a 'history'", "into one list 'messages'")
