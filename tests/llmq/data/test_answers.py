"""Prompts and answers in columns of their own: how they are joined, what is left, labels, and marked turns."""

from __future__ import annotations

from typing import Any

import pytest

from llmq.data.answers import joined, label, marked_turns

ASK = [{"role": "user", "content": "q"}]
GOOD = [{"role": "assistant", "content": "good"}]
BAD = [{"role": "assistant", "content": "bad"}]


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({"prompt": "q", "completion": " a"}, {"prompt + completion": "q a"}),
        ({"prompt": "q", "chosen": " a", "rejected": " b"}, {"prompt + chosen": "q a", "rejected": " b"}),
        ({"prompt": "I", "chosen": "I am", "rejected": "No"}, {"prompt + chosen": "II am", "rejected": "No"}),
        ({"prompt": "I", "chosen": "I am", "rejected": "I do"}, {"prompt + chosen": "I am", "rejected": "I do"}),
        ({"prompt": ASK, "completion": GOOD, "n": 1}, {"prompt + completion": ASK + GOOD, "n": 1}),
        ({"prompt": ASK, "chosen": ASK + GOOD}, {"prompt + chosen": ASK + GOOD}),
        ({"prompt": ASK, "chosen": GOOD[0]}, {"prompt + chosen": ASK + GOOD}),
        ({"messages": ASK, "chosen": "good"}, {"messages + chosen": ASK + GOOD}),
        ({"instruction": "q", "chosen": "good"}, {"instruction + chosen": ASK + GOOD}),
        (
            {"instruction": "q", "input": "x", "chosen": "good"},
            {"instruction + chosen": [{"role": "user", "content": "q\n\nx"}, *GOOD]},
        ),
        ({"input": ASK, "preferred_output": GOOD}, {"input + preferred_output": ASK + GOOD}),
        (
            {"input": {"messages": ASK, "tools": [1]}, "preferred_output": GOOD},
            {"input + preferred_output": ASK + GOOD, "tools": [1]},
        ),
        ({"chosen": "a", "rejected": "b"}, None),
        ({"prompt": "q"}, None),
        ({"prompt": "q", "rejected": "b"}, None),
        ({"prompt": "q", "chosen": None}, None),
        ({"prompt": "q", "chosen": 5}, None),
        ({"prompt": [], "chosen": GOOD}, None),
        ({"question": "q", "completion": "a"}, None),
        ({"messages": ASK + GOOD, "chosen": BAD}, None),
        ({"messages": "no chat", "prompt": "q", "chosen": "a"}, None),
    ],
)
def test_a_prompt_and_its_answer_are_one_column(fields: dict[str, Any], made: dict[str, Any] | None) -> None:
    both = joined(fields)
    assert (None if both is None else both.fields) == made


def test_labels() -> None:
    assert [label({"label": value}) for value in (False, "FALSE", True, 0, None)] == ["false", "false", "true", "0", ""]
    assert label({"kto_tag": False}) == "false" and label({}) == ""


def test_marked_turns() -> None:
    text = "\n\nHuman: one\n\ntwo: three\n\nAssistant: four\n\nHuman: five\n\nAssistant:"
    assert marked_turns(text) == [
        {"role": "user", "content": "one\n\ntwo: three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
        {"role": "assistant", "content": ""},
    ]
    for other in ("", "see", "Human: see", "Assistant: see", "see\n\nHuman: a\n\nAssistant: b", "A Human: b"):
        assert marked_turns(other) is None
