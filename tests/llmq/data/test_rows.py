"""Rows of text: where each comes from, which of its columns is read, chats in both spellings, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmq.checkpoint import hub
from llmq.data.rows import Row, RowReader, chat_messages, hub_rows, jsonl_rows, parquet_rows
from llmq.errors import LlmqError
from llmq.recipe.recipe import Calibration
from tests.llmq.refusal import refused

CHAT = [{"role": "user", "content": "see"}, {"role": "assistant", "content": "noon"}]


def text(fields: dict[str, Any], column: str | None = None, tokenizer: Any = None) -> str:
    return RowReader("a.jsonl", column, tokenizer).text(Row("a.jsonl:3", fields))


@pytest.mark.parametrize(
    ("fields", "column", "found"),
    [
        ({"text": "see", "title": "noon"}, None, "see"),
        ({"title": "noon", "id": 3}, None, "noon"),
        ({"text": "see", "title": "noon"}, "title", "noon"),
        ({"text": 5, "title": "noon"}, None, "noon"),
        ({"text": " \n\t "}, None, ""),
        ({"text": None}, "text", ""),
        ({"messages": []}, None, ""),
        ({"text": " see "}, None, " see "),
    ],
)
def test_the_column_that_is_read(fields: dict[str, Any], column: str | None, found: str) -> None:
    assert text(fields, column) == found


def test_columns_of_media_are_no_fault_where_they_are_empty_or_the_text_is_named() -> None:
    assert text({"text": "no image here", "images": []}) == "no image here"
    assert text({"text": "no image here", "image": None, "image_of": 1}) == "no image here"
    assert text({"text": "<image> a cat", "image": "a.png"}, "text") == "<image> a cat"


def test_chats_go_before_text_and_any_string(bpe: Any) -> None:
    for name in ("messages", "dialogue"):
        assert text({"text": "noon", name: CHAT}, tokenizer=bpe).startswith("[user] see")
    assert text({"source": "web", "messages": CHAT}, tokenizer=bpe).startswith("[user] see")


def test_the_column_is_chosen_by_the_first_row() -> None:
    reader = RowReader("a.jsonl", None, None)
    assert reader.text(Row("a.jsonl:1", {"title": "see"})) == "see"
    assert reader.text(Row("a.jsonl:2", {"title": "noon", "text": "other"})) == "noon"
    refused(lambda: reader.text(Row("a.jsonl:3", {"text": "other"})), "a.jsonl:3 has no column 'title', only text")


@pytest.mark.parametrize(
    ("fields", "column", "words"),
    [
        ({"x": "a", "y": "b"}, None, ("a.jsonl has more than one column of text", "x, y", "'column'")),
        ({"x": 1}, None, ("a.jsonl has no column of text", "are x")),
        ({}, None, ("no column of text", "are none")),
        ({"x": "a"}, "y", ("a.jsonl:3 has no column 'y', only x", "'column'")),
        ({}, "y", ("only none",)),
        ({"y": 5}, "y", ("a.jsonl:3: column 'y' holds neither a text nor a list of chat messages",)),
        ({"y": [{"role": "user"}]}, "y", ("holds neither",)),
        ({"text": "<image> a cat", "image": "a.png"}, None, ("a.jsonl:3 has a column 'image'", "--column")),
        ({"text": "<video> a cat", "videos": [{"bytes": ""}]}, None, ("a.jsonl:3 has a column 'videos'",)),
    ],
)
def test_rows_without_text(fields: dict[str, Any], column: str | None, words: tuple[str, ...]) -> None:
    refused(lambda: text(fields, column), *words)


def test_a_chat_is_what_the_tokenizer_makes_of_it(bpe: Any, plain: Any) -> None:
    assert text({"messages": CHAT}, tokenizer=bpe) == bpe.apply_chat_template(CHAT, tokenize=False)
    refused(lambda: text({"messages": CHAT}, tokenizer=plain), "(column 'messages')", "no chat template")


def test_chats_that_the_template_refuses_are_counted_and_the_first_is_told(bpe: Any) -> None:
    reader = RowReader("a.jsonl", "messages", bpe)
    assert (reader.notes(), reader.reasons()) == ((), "")
    bad = [{"role": "tool", "content": "see"}]
    for line, messages in enumerate((CHAT, bad, bad), 1):
        assert bool(reader.text(Row(f"a.jsonl:{line}", {"messages": messages}))) == (line == 1)
    (note,) = reader.notes()
    assert "a.jsonl: the chat template refused 2 rows (first a.jsonl:2: no tools)" in note
    assert reader.reasons() == " (the chat template refused 2 rows: first a.jsonl:2: no tools)"


def looked(rows: list[dict[str, Any]], tokenizer: Any, column: str | None = None) -> tuple[list[str], RowReader]:
    reader = RowReader("a.jsonl", column, tokenizer)
    found = (Row(f"a.jsonl:{i}", fields) for i, fields in enumerate(rows, 1))
    return [reader.text(row) for row in reader.look(found)], reader


def test_an_ambiguous_choice_says_what_was_taken_and_how_to_name_another(bpe: Any) -> None:
    rows = [{"chosen": CHAT, "text": "x", "id": "y", "rejected": CHAT[:1]}]
    texts, reader = looked(rows, bpe)
    assert texts == [bpe.apply_chat_template(CHAT, tokenize=False)]
    (note,) = reader.notes()
    assert "the chats of column 'chosen' are taken, not 'rejected', 'text'; name another with --column" in note
    texts, reader = looked(rows, bpe, "text")
    assert (texts, reader.notes()) == (["x"], ())
    texts, reader = looked([{"messages": CHAT, "id": "y"}], bpe)
    assert texts and not reader.notes()


def test_a_prompt_with_its_answer_and_its_columns_by_name(bpe: Any) -> None:
    rows = [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[:1]}] * 2
    whole = bpe.apply_chat_template(CHAT, tokenize=False)
    texts, reader = looked(rows, bpe)
    assert texts == [whole] * 2
    (note,) = reader.notes()
    assert "column 'prompt + chosen' are taken, not 'rejected'; name another with --column" in note
    assert looked(rows, bpe, "prompt + chosen")[0] == [whole] * 2
    assert looked(rows, bpe, "chosen")[0] == [bpe.apply_chat_template(CHAT[1:], tokenize=False)] * 2
    texts, reader = looked([{"prompt": "see ", "chosen": "noon", "rejected": "vu", "system": "be"}], None)
    (note,) = reader.notes()
    assert texts == ["see noon"] and "not 'system', 'rejected'" in note
    texts, reader = looked([{"instruction": "see", "chosen": "noon", "history": [["a", "b"]]}], bpe)
    assert texts == [whole] and "not 'history'" in reader.notes()[0]


def test_a_lone_text_beside_what_cannot_be_read_is_told() -> None:
    unread = [{"role": "user", "parts": [{"text": "noon"}]}]
    texts, reader = looked([{"note": "see noon", "contents": unread}], None)
    (note,) = reader.notes()
    assert texts == ["see noon"] and "column 'note' are taken, not 'contents'; name another" in note
    assert looked([{"note": "\u8702\u3002", "meta": {"n": 1}}], None)[0] == ["\u8702\u3002"]


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "7", "data": ["see", "noon"]},
        {"source": "web", "contents": [{"role": "user", "parts": []}]},
        {"system": "You are a bee.", "turns": [["see", "noon"]]},
        {"tools": '[{"name": "fly"}, 1]', "messages": [{"author": "bee", "content": "see"}]},
    ],
)
def test_an_identifier_beside_what_cannot_be_read_is_not_the_text(fields: dict[str, Any]) -> None:
    refused(lambda: looked([fields] * 3, None), "no column of text", ", ".join(fields), "--column")


def test_the_first_rows_decide_and_no_row_is_lost(bpe: Any) -> None:
    rows: list[dict[str, Any]] = [{"source": "web", "talk": None}] * 5 + [{"source": "web", "talk": CHAT}] * 2
    assert looked(rows, bpe)[0] == [""] * 5 + [bpe.apply_chat_template(CHAT, tokenize=False)] * 2
    assert looked([{"id": "7", "body": "see"}, {"id": "8", "body": "noon"}], bpe)[0] == ["see", "noon"]
    assert looked([{"id": "7"}], bpe)[0] == ["7"]


def test_a_fault_among_the_first_rows_is_raised_after_the_rows_before_it() -> None:
    def rows() -> Iterator[Row]:
        yield Row("a.jsonl:1", {"text": "see"})
        raise LlmqError("a.jsonl:2 is not JSON")

    reader = RowReader("a.jsonl", None, None)
    found = reader.look(rows())
    assert reader.text(next(found)) == "see"
    refused(lambda: next(found), "a.jsonl:2 is not JSON")


def test_what_the_template_hides_is_counted(bpe: Any) -> None:
    call = {"role": "assistant", "content": "noon", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"messages": [CHAT[0], call], "tools": [{"name": "f"}]}
    _, reader = looked([{"messages": CHAT}, row, row], bpe)
    calls, tools = reader.notes()
    assert "does not show the tool calls of 2 rows (first a.jsonl:2)" in calls
    assert "does not show the list of tools of 2 rows (first a.jsonl:2)" in tools


def test_both_spellings_of_a_chat_are_one() -> None:
    for human in ("human", "user"):
        for gpt in ("gpt", "chatgpt", "bot", "assistant"):
            assert chat_messages([{"from": human, "value": "see"}, {"from": gpt, "value": "noon"}]) == CHAT
    assert chat_messages([{"from": "system", "value": ""}]) == [{"role": "system", "content": ""}]
    assert chat_messages([]) == []
    assert chat_messages([{"assistant": "noon", "human": "see"}] * 2) == CHAT * 2
    for other in (None, "see", {"role": "user"}, ["see"], [{"role": 1, "content": "a"}], [{"role": "user"}]):
        assert chat_messages(other) is None


def test_lines_of_json(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "see"}\n\n  \n"noon"\n{"x": [1]}', encoding="utf-8")
    assert [*jsonl_rows(file)] == [
        Row(f"{file}:1", {"text": "see"}),
        Row(f"{file}:4", {"text": "noon"}),
        Row(f"{file}:5", {"x": [1]}),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": ', "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"3", "is not a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_line_is_named_when_it_is_reached(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "see"}\n' + line + b"\n")
    rows = jsonl_rows(file)
    assert next(rows).fields == {"text": "see"}
    refused(lambda: next(rows), f"{file}:2 {words}")


def test_a_file_that_is_not_there_is_named_by_what_it_is(tmp_path: Path) -> None:
    refused(lambda: next(jsonl_rows(tmp_path / "none", "rows")), f"rows {tmp_path / 'none'} cannot be read: No such")
    refused(lambda: next(parquet_rows(tmp_path / "none")), f"{tmp_path / 'none'} cannot be read as parquet")


def test_rows_of_parquet_are_numbered_on_over_its_groups(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    file, rows = tmp_path / "a.parquet", [{"text": f"see {i}", "chat": CHAT} for i in range(150)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=40)
    assert [*parquet_rows(file)] == [Row(f"{file} row {i}", fields) for i, fields in enumerate(rows)]
    file.write_bytes(file.read_bytes()[:-9])
    refused(lambda: next(parquet_rows(file)), str(file), "cannot be read as parquet")


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub, with one data set on it; what was asked of it. 'raises': what reading the rows ends in."""
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        asked.update(name=name, config=config, **options)
        if "raises" in asked:
            raise asked["raises"]
        return iter([{"text": "see"}, {"text": "noon"}])

    monkeypatch.setattr(hub, "repository", lambda name, kind: SimpleNamespace(sha=f"commit of {kind} {name}"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def asked_for(text: str) -> list[Row]:
    return [*hub_rows(Calibration(text=text, split="validation"))]


@pytest.mark.parametrize(("text", "config"), [("org/set", None), ("org/set:english", "english")])
def test_a_data_set_is_streamed_at_its_commit(streamed: dict[str, Any], text: str, config: str | None) -> None:
    assert asked_for(text) == [Row("org/set row 0", {"text": "see"}), Row("org/set row 1", {"text": "noon"})]
    where = {"name": "org/set", "config": config, "split": "validation", "revision": "commit of dataset org/set"}
    assert streamed == where | {"streaming": True}


@pytest.mark.parametrize("text", ["notes.txt", "a/b.parquet", "./data", "/data/x", "org/rows.jsonl"])
def test_a_path_is_never_looked_for_on_the_hub(streamed: dict[str, Any], text: str) -> None:
    refused(lambda: asked_for(text), f"calibration text {text}: no such file")
    assert not streamed


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("Config name is missing.\nPick one of: ['a', 'b']\nExample: …"), ("['a', 'b']", "org/set:CONFIG")),
        (ValueError("Bad split: validation. Available splits: ['train']"), ("['train']", "'split'")),
        (ValueError("something else"), ("something else",)),
    ],
)
def test_what_the_data_set_has_is_told(streamed: dict[str, Any], error: Exception, words: tuple[str, ...]) -> None:
    streamed["raises"] = error
    message = refused(lambda: asked_for("org/set"), "calibration data set org/set: ", *words)
    assert "Example" not in message


def test_nulls_that_datasets_fills_in_are_left_out(streamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real IterableDataset, whose column of objects has one type for all rows."""
    import datasets

    rows = [
        {"messages": [{"role": "user", "content": "see"}, {"role": "assistant", "content": None, "calls": [{"a": 1}]}]}
    ]
    rows.append({"messages": [{"role": "user", "content": "see", "calls": [{"b": 2}]}]})
    set_ = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert next(iter(set_))["messages"][0]["calls"] is None  # what is to be left out
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: set_)
    assert [dict(row.fields) for row in asked_for("org/set")] == rows


def test_what_datasets_cannot_read_is_told_and_what_is_ours_goes_through(streamed: dict[str, Any]) -> None:
    from datasets.exceptions import DatasetNotFoundError

    streamed["raises"] = DatasetNotFoundError("gone\nsecond line")
    refused(lambda: asked_for("org/set"), "calibration data set org/set cannot be read: DatasetNotFoundError: gone")
    ours = LlmqError("said before")
    streamed["raises"] = ours
    with pytest.raises(LlmqError) as caught:
        asked_for("org/set")
    assert caught.value is ours
    streamed["raises"] = ConnectionError("no route")
    refused(lambda: asked_for("org/set"), "org/set")


def test_a_row_s_own_system_text_is_in_the_window(bpe: Any) -> None:
    rows = [{"system": "fox", "conversations": CHAT}]
    texts, _ = looked(rows, bpe)
    same, _ = looked([{"messages": [{"role": "system", "content": "fox"}, *CHAT]}], bpe)
    assert texts == same
