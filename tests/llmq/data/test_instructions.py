"""Which tokens of a row are learned, for every kind of row, with and without a chat template; and broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmq.data.instructions import Example, read
from tests.llmq.refusal import refused

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    """A byte tokenizer without a template, whose end of text is ~."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "~"
    return tokenizer


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def shown(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The whole text, and what is learned of it."""
    learned = [i for i, learn in zip(example.ids, example.learn, strict=True) if learn]
    return tokenizer.decode(example.ids), tokenizer.decode(learned)


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Un."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Deux."},
    ]
}


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


def test_nothing_to_learn_from(tmp_path: Path, plain: Any) -> None:
    refused(lambda: read(write(tmp_path), plain, seqlen=10), "rows.jsonl", "empty")
    refused(lambda: read(tmp_path / "none.jsonl", plain, seqlen=10), "none.jsonl", "no such file")
    (tmp_path / "rows.csv").write_text("a,b\n")
    refused(lambda: read(tmp_path / "rows.csv", plain, seqlen=10), "rows.csv", ".jsonl")
    long = write(tmp_path, {"prompt": "p" * 20, "completion": "c"})
    refused(lambda: read(long, plain, seqlen=10), "--seqlen")
