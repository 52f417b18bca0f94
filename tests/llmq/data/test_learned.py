"""Which answers are learned: those with marks, of preference rows, and with labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmq.data.instructions import read
from tests.llmq.data.learned import CALLED, CHAT, SAID, TOOL, caller, chat, plain, shown, write
from tests.llmq.refusal import refused

__all__ = ["caller", "chat", "plain"]


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def learned(folder: Path, tokenizer: Any, *rows: object) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """(whole, learned) of each row that is kept, and the notes."""
    found = read(write(folder, *rows), tokenizer, seqlen=500)
    return [shown(example, tokenizer) for example in found.all], found.notes


ONE_TWO = "<user>1</user><assistant>one</assistant><user>2</user><assistant>two</assistant>"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {}, ["one", "two"]),
        ({"weight": 0}, {}, ["two"]),
        ({"weight": 0}, {"weight": 1}, ["two"]),
        ({"weight": 1}, {"weight": 0}, ["one"]),
        ({"weight": None}, {"weight": 0.0}, ["one"]),
        ({"train": False}, {"train": True}, ["two"]),
        ({"training": False}, {}, ["two"]),
        ({"loss": False}, {"loss": True}, ["two"]),
        ({"loss_weight": 0.0}, {"loss_weight": 1.0}, ["two"]),
        ({"weight": 1, "train": False}, {}, ["two"]),
        ({"train": None, "train_detail": None}, {"train_detail": []}, ["one", "two"]),
    ],
)
def test_an_answer_that_is_marked_is_context(
    tmp_path: Path, chat: Any, plain: Any, first: dict[str, Any], second: dict[str, Any], said: list[str]
) -> None:
    rows = [turn("user", "1"), turn("assistant", "one", **first), turn("user", "2"), turn("assistant", "two", **second)]
    sharegpt = [
        {"from": {"assistant": "gpt", "user": "human"}[str(row.pop("role"))], "value": row.pop("content"), **row}
        for row in (dict(row) for row in rows)
    ]
    expected = (ONE_TWO, "".join(f"{text}</assistant>" for text in said))
    assert learned(tmp_path, chat, {"messages": rows}, {"conversations": sharegpt}) == ([expected] * 2, ())
    ((_, without),), _ = learned(tmp_path, plain, {"messages": rows})
    assert without == "".join(f"{text}~" for text in said)


@pytest.mark.parametrize(
    "mark", [{"weight": 0.5}, {"weight": 2}, {"weight": "0"}, {"train": "no"}, {"loss": [0]}, {"weight": -1}]
)
def test_a_mark_that_is_neither_is_refused_by_line(tmp_path: Path, chat: Any, mark: dict[str, Any]) -> None:
    bad = {"messages": [turn("user", "1"), turn("assistant", "one", **mark)]}
    file = write(tmp_path, CHAT, bad)
    (key, value), *_ = mark.items()
    refused(
        lambda: read(file, chat, seqlen=99), f"{file}:2: 'messages': message 2 (assistant) has {key} {value!r}", "mend"
    )
    read(write(tmp_path, {"messages": [turn("user", "1", **mark), turn("assistant", "one")]}), chat, seqlen=99)


def test_a_mark_of_parts_is_refused(tmp_path: Path, chat: Any) -> None:
    bad = turn("assistant", "one", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])
    file = write(tmp_path, {"messages": [turn("user", "1"), bad]})
    refused(lambda: read(file, chat, seqlen=99), f"{file}:1", "'train_detail'", "mark it with 'train'")


def test_rows_without_an_answer_to_learn_are_left_out_and_told(tmp_path: Path, chat: Any) -> None:
    bare = {"messages": [turn("user", "1"), turn("assistant", "one", weight=0)]}
    found, (note,) = learned(tmp_path, chat, bare, CHAT, bare)
    assert len(found) == 1 and "all marked as not to be learned (2 rows, first" in note and "rows.jsonl:1)" in note
    refused(lambda: read(write(tmp_path, bare), chat, seqlen=99), "rows.jsonl:1", "nothing to learn")


def test_a_mark_of_another_role_is_told(tmp_path: Path, chat: Any) -> None:
    row = {"messages": [turn("user", "1", train=True), turn("assistant", "one")]}
    found, (note,) = learned(tmp_path, chat, row)
    assert found[0][1] == "one</assistant>" and "only answers are (1 row," in note


ASK, GOOD, BAD = [turn("user", "q")], [turn("assistant", "good")], [turn("assistant", "bad")]
WORSE = "the better answers are learned, never {} (1 row,"
HH = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"rejected": BAD, "chosen": GOOD, "prompt": ASK},
        {"prompt": ASK, "chosen": [*ASK, *GOOD], "rejected": [*ASK, *BAD]},
        {"rejected": [*ASK, *BAD], "chosen": [*ASK, *GOOD]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "qgood", "rejected": "qbad"},
        {"prompt": "q", "chosen": [*ASK, *GOOD], "rejected": [*ASK, *BAD]},
        {"prompt": "q", "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "messages": [*ASK, *GOOD], "chosen": [*ASK, *GOOD], "rejected": [*ASK, *BAD]},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {},
        },
        {"chosen": f"{HH} good", "rejected": f"{HH} bad"},
        {"prompt": HH, "chosen": " good", "rejected": " bad"},
        {"messages": [*ASK, *GOOD], "rejected_response": "bad"},
        {"input": {"messages": ASK, "tools": []}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"prompt": json.dumps(ASK), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
    ],
)
def test_the_better_answer_is_learned_and_never_the_worse(tmp_path: Path, chat: Any, row: dict[str, Any]) -> None:
    found, (note,) = learned(tmp_path, chat, row)
    assert found == [("<user>q</user><assistant>good</assistant>", "good</assistant>")]
    worse = next(name for name in row if name in ("rejected", "non_preferred_output", "rejected_response"))
    assert WORSE.format(repr(worse)) in note


def test_the_answers_of_a_prompt_are_context(tmp_path: Path, chat: Any) -> None:
    before = [turn("user", "1"), turn("assistant", "one", train=True), turn("user", "2")]
    two = [turn("assistant", "two")]
    marked = "\n\nHuman: 1\n\nAssistant: one\n\nHuman: 2\n\nAssistant:"
    rows = [
        {"prompt": before, "completion": two},
        {"prompt": before, "chosen": [*before, *two]},
        {"prompt": marked, "chosen": " two"},
    ]
    assert learned(tmp_path, chat, *rows) == ([(ONE_TWO, "two</assistant>")] * 3, ())
    found, _ = learned(tmp_path, chat, {"chosen": f"{marked} two"}, {"chosen": [*before, *two]})
    assert found == [(ONE_TWO, "one</assistant>two</assistant>")] * 2


def test_prompts_and_answers_without_a_template(tmp_path: Path, plain: Any) -> None:
    found, _ = learned(tmp_path, plain, {"prompt": "ab", "chosen": "cd"}, {"chosen": "ab cd", "rejected": "ab ef"})
    assert found == [("abcd~", "cd~"), ("ab cd~", "ab cd~")]
    asked = {"system": "s", "prompt": "ab", "completion": "cd"}
    ((whole, answer),), _ = learned(tmp_path, plain, asked)
    assert whole == "### System:\ns\n\n### User:\nab\n\n### Assistant:\ncd~" and answer == "cd~"


def test_a_text_goes_before_answers_without_a_prompt(tmp_path: Path, plain: Any) -> None:
    assert learned(tmp_path, plain, {"text": "ab", "chosen": "cd", "rejected": "ef"}) == ([("ab~", "ab~")], ())
    file = write(tmp_path, {"prompt": "ab", "chosen": None, "rejected": "cd"})
    refused(lambda: read(file, plain, seqlen=99), f"{file}:1: 'chosen' is NoneType, not a text")


def test_tools_of_a_prompt_are_kept(tmp_path: Path, caller: Any) -> None:
    row = {"input": {"messages": CALLED[:1], "tools": [TOOL]}, "preferred_output": CALLED[1:2]}
    ((whole, answer),), notes = learned(tmp_path, caller, row)
    assert whole.startswith("<tools>") and answer == SAID and not notes


@pytest.mark.parametrize("label", [False, "False", "false"])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_an_answer_that_is_not_wanted_is_left_out(tmp_path: Path, chat: Any, label: object, key: str) -> None:
    kept = {"prompt": "q", "completion": "good", key: True}
    for row in (
        {"prompt": "q", "completion": "bad"},
        {"prompt": ASK, "completion": BAD},
        {"messages": [*ASK, *BAD]},
        {"instruction": "q", "output": "bad"},
    ):
        found, (note,) = learned(tmp_path, chat, kept, {**row, key: label})
        assert found == [("<user>q</user><assistant>good</assistant>", "good</assistant>")]
        assert "label is false are left out (1 row, first" in note and "rows.jsonl:2)" in note
    assert len(learned(tmp_path, chat, {"text": "see", key: label})[0]) == 1
    _, (note,) = learned(tmp_path, chat, {**kept, key: 0})
    assert "rows whose label is 0 are learned" in note
    refused(lambda: read(write(tmp_path, {**kept, key: label}), chat, seqlen=99), "label is false", "nothing to learn")
