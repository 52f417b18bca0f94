"""Tokenizers of bytes with and without a template, rows for them, and what is learned of a row."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from llmq.data.instructions import Example
from tests.llmq.data.made import TOOL_TEMPLATE

TAGS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Un."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Deux."},
    ]
}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather"}}
CALLED = [
    {"role": "user", "content": "Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "Cold."},
]
SAID = '<call>weather{"city": "Paris"}</call>\n'


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
    tokenizer.chat_template = TAGS
    return tokenizer


@pytest.fixture(scope="module")
def caller(chat: Any) -> Any:
    tokenizer = deepcopy(chat)
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def write(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def shown(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The whole text, and what is learned of it."""
    learned = [i for i, learn in zip(example.ids, example.learn, strict=True) if learn]
    return tokenizer.decode(example.ids), tokenizer.decode(learned)
