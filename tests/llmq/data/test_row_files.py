"""Files as people bring them: each is read to exactly the text it holds, or refused by file, line and way out."""

from __future__ import annotations

import gzip
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from llmq.data.calibration import windows
from llmq.recipe.recipe import Calibration
from tests.llmq.data.made import TOOL_TEMPLATE
from tests.llmq.data.row_files import CHAT, RIGHT, SEE, TEXTS, lines, parquet, table, zipped, zstd
from tests.llmq.refusal import refused

IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}]
UNREADABLE: dict[str, tuple[str, bytes, str, tuple[str, ...]]] = {
    # name: file, bytes, what follows the file's name, words of the reason and the way out
    "truncated line": ("a.jsonl", SEE[:-8], ":2", ("is not JSON", "on each line")),
    "array in lines": ("a.jsonl", json.dumps(TEXTS, indent=1).encode(), ":1", ("is not JSON",)),
    "array on a line": ("a.jsonl", json.dumps(TEXTS).encode(), ":1", ("is not a JSON object", "on each line")),
    "two values for a key": ("a.jsonl", SEE + b'{"text": "a", "text": "b"}', ":3", ("two values for 'text'",)),
    "Latin-1 in lines": (
        "a.jsonl",
        SEE + '{"text": "d\u00e9j\u00e0"}'.encode("latin-1"),
        ":3",
        ("not UTF-8", "save it"),
    ),
    "half a character": ("a.jsonl", b'{"text": "see"}\n{"text": "\\ud83d"}', ":2", ("half of a character", "mend")),
    "half a character in a chat": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        ":1",
        ("half of a character",),
    ),
    "UTF-16 without a mark": ("a.jsonl", SEE.decode().encode("utf-16-le"), ":1", ("zero bytes", "UTF-8")),
    "number for a text": ("a.jsonl", b'{"text": "see"}\n{"text": 5}', ":2", ("type int", "--column")),
    "NaN for a text": ("a.jsonl", b'{"text": "see"}\n{"text": NaN}', ":2", ("type float",)),
    "nested lists": ("a.jsonl", lines({"text": [["see"]]}), "", ("no column of text", "--column")),
    "nested chats": ("a.jsonl", lines({"messages": [CHAT]}), "", ("no column of text",)),
    "several texts": ("a.jsonl", lines({"x": "see", "y": "noon"}), "", ("more than one column", "x, y", "--column")),
    "column that goes": ("a.jsonl", SEE + lines({"body": "see"}), ":3", ("no column 'text'", "--column")),
    "one message a line": ("a.jsonl", lines(*CHAT), ":1", ("one message", "'messages'")),
    "array that is one chat": ("a.json", json.dumps(CHAT).encode(), ":1", ("one message", "'messages'")),
    "truncated array": ("a.json", json.dumps(TEXTS, indent=1).encode()[:-3], ":7", ("is not JSON", "write the file")),
    "truncated value": ("a.json", json.dumps(TEXTS, indent=1).encode()[:-12], ":6", ("is not JSON",)),
    "no comma": ("a.json", b'[{"text": "see"}\n{"text": "noon"}]', ":2", ("no comma",)),
    "text after the array": ("a.json", b'[{"text": "see"}]\n[1]', ":2", ("after the array",)),
    "several lists": (
        "a.json",
        json.dumps({"train": TEXTS, "test": TEXTS}).encode(),
        ":1",
        ("train, test", "write one"),
    ),
    "columns": ("a.json", json.dumps({"text": {"0": "see"}}).encode(), ":1", ("no row", "a row on each line")),
    "columns as lists": ("a.json", json.dumps({"text": ["see"]}).encode(), ":1", ("no row", "a row on each line")),
    "array of numbers": ("a.json", b"[\n1]", ":2", ("is not a JSON object",)),
    "deep JSON": ("a.json", b"[" * 100_000, ":1", ("is not JSON",)),
    "semicolons": ("a.csv", b"text;n\nsee;1\n", ":1", ("';'", "commas")),
    "too many cells": ("a.csv", b"text,n\nsee,1\nsee, noon,2\n", ":3", ("3 cells", "double quotes")),
    "open quote": ("a.csv", b'text\nsee\n"noon\n', ":3", ("is not CSV", "double quotes", "twice")),
    "a return outside of quotes": (
        "a.csv",
        b"text,n\nsee,1\nno\ron,2\n",
        ":3",
        ("is not CSV", "line ends in double quotes"),
    ),
    "a name twice": ("a.csv", b"text,text\nsee,noon\n", ":1", ("'text' twice", "own name")),
    "Latin-1 in CSV": ("a.csv", "text\nsee\nd\u00e9j\u00e0\n".encode("latin-1"), ":3", ("not UTF-8", "save it")),
    "Python's list": ("a.csv", table(["chat"], [str(CHAT)]), ":2", ("not JSON", "write it as JSON")),
    "parquet by name only": ("a.parquet", SEE, "", ("cannot be read as parquet", "write it anew")),
    "parquet cut short": ("a.parquet", parquet(*TEXTS)[:-9], "", ("cannot be read as parquet",)),
    "parquet called lines": ("a.jsonl", parquet(*TEXTS), ":1", ("zero bytes",)),
    "parquet compressed": ("a.parquet.gz", gzip.compress(parquet(*TEXTS)), "", ("compressed", "unpack")),
    "cut gzip": ("a.jsonl.gz", gzip.compress(SEE)[:-9], "", ("decompressed", "compress it anew")),
    "gzip by name only": ("a.jsonl.gz", b"\x1f\x8b" + SEE, "", ("cannot be read", "write it anew")),
    "cut zstd": ("a.jsonl.zst", zstd(SEE)[:-5], "", ("cannot be read", "write it anew")),
    "zip of two": ("a.jsonl.zip", zipped(a=SEE, b=SEE), "", ("2 files", "unpack")),
    "empty": ("a.jsonl", b"", "", ("empty",)),
    "empty array": ("a.json", b"[]", "", ("empty",)),
    "empty CSV": ("a.csv", b"text\n", "", ("empty",)),
    "empty texts": ("a.jsonl", lines({"text": ""}, {"text": None}), "", ("empty",)),
    "rows called prose": ("a.txt", b"\n" + SEE, ":2", ("rows in JSON", ".jsonl")),
    "array called prose": ("a.md", b"[\n" + json.dumps(TEXTS[0]).encode() + b"]", ":1", ("rows in JSON", ".json")),
    "array of texts called prose": ("a.txt", b'["see",\n"noon"]', ":1", ("rows in JSON", ".json")),
    "lines of arrays called prose": ("a.txt", b'["see"]\n["noon"]\n', ":1", ("rows in JSON", ".jsonl")),
    "long array called prose": ("a.txt", json.dumps(["see noon"] * 150_000).encode(), ":1", ("rows in JSON",)),
    "lines of texts called prose": ("a.txt", b'"see\\nvu"\n"noon"\n', ":1", ("rows in JSON", ".jsonl")),
    "one text in JSON called prose": ("a", json.dumps("see\nnoon").encode(), ":1", ("rows in JSON",)),
    "indented object called prose": (
        "a.txt",
        json.dumps({"messages": CHAT}, indent=1).encode(),
        ":1",
        ("rows in JSON",),
    ),
    "web page": ("a.html", b"<p>see</p>", "", ("a web page", ".txt")),
    "XML": ("A.XML", b"<a>see</a>", "", ("XML", ".txt")),
    "YAML": ("a.yaml", b"- text: see\n", "", ("YAML", ".jsonl")),
    "YAML, short ending, gzip": ("a.yml.gz", gzip.compress(b"- text: see\n"), "", ("YAML", ".jsonl")),
    "notebook": ("a.ipynb", b'{"cells": []}', "", ("a notebook", "export")),
    "document": ("a.docx", zipped(a=SEE, b=SEE), "", ("a document", "save its text")),
    "spreadsheet": ("a.xlsx", zipped(a=SEE, b=SEE), "", ("a spreadsheet", "save the sheet as .csv")),
    "archive": ("a.tar.gz", gzip.compress(SEE), "", ("an archive", "unpack")),
    "chats after texts": (
        "a.jsonl",
        SEE + lines({"messages": CHAT}),
        ":1",
        ("no column 'messages', only text", "a.jsonl:3", "files of their own", "--column"),
    ),
    "texts after chats": (
        "a.jsonl",
        lines({"messages": CHAT}) + SEE,
        ":2",
        ("no column 'messages', only text", "a.jsonl:1", "files of their own"),
    ),
    "chats long after texts": (
        "a.jsonl",
        SEE * 20 + lines({"messages": CHAT}),
        ":41",
        ("no column 'text', only messages", "a.jsonl:1", "files of their own"),
    ),
    "answers in lists of texts": (
        "a.jsonl",
        lines({"prompt": "see noon", "chosen": ["vu"], "rejected": ["at"]}),
        "",
        ("no column of text", "prompt, chosen, rejected", "--column"),
    ),
    "prompts among answers": (
        "a.jsonl",
        lines({"prompt": "see", "completion": "noon"}, {"prompt": "see"}),
        ":2",
        ("no column 'prompt + completion', only prompt", "a.jsonl:1", "files of their own"),
    ),
    "Latin-1 in prose": ("a.txt", "see\nd\u00e9j\u00e0".encode("latin-1"), ":2", ("not UTF-8", "save it")),
    "binary prose": ("a.txt", b"see\nno\0on", ":2", ("zero bytes", "save it")),
    "image": ("a.jsonl", lines({"messages": CHAT}, {"messages": IMAGE}), ":2", ("'image'", "take the part")),
    "object for a content": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": {"a": 1}}]}),
        ":1",
        ("type dict",),
    ),
    "tools in words": ("a.jsonl", lines({"messages": CHAT, "tools": "a hammer"}), ":1", ("'tools'", "mend")),
    "calls in words": (
        "a.jsonl",
        lines({"messages": [{"role": "assistant", "content": "", "tool_calls": "weather"}]}),
        ":1",
        ("tool_calls", "mend"),
    ),
    "ShareGPT's call that is none": (
        "a.jsonl",
        lines({"conversations": [{"from": "function_call", "value": "weather(Paris)"}]}),
        ":1",
        ("no call in JSON", "mend"),
    ),
}


@pytest.fixture(scope="session")
def caller(bpe: Any) -> Any:
    """The tests' tokenizer with a template that shows calls and tools."""
    made = deepcopy(bpe)
    made.chat_template = TOOL_TEMPLATE
    return made


def write(folder: Path, name: str, raw: bytes) -> Path:
    file = folder / name
    file.write_bytes(raw)
    return file


def asked(file: Path, seqlen: int) -> Calibration:
    return Calibration(text=str(file), samples=1, seqlen=seqlen)


@pytest.mark.parametrize("case", RIGHT)
def test_a_file_is_read_to_what_it_holds_and_nothing_else(tmp_path: Path, caller: Any, case: str) -> None:
    name, raw, texts = RIGHT[case]
    file = write(tmp_path, name, raw)
    prose = case.startswith("prose")
    expected: list[int] = []
    for text in texts:
        ids = caller(text, add_special_tokens=False)["input_ids"]
        expected += ids if prose else [*ids, caller.eos_token_id]
    found = windows(asked(file, len(expected)), caller)
    assert found.ids.tolist() == [expected]
    assert found.first == caller.decode(expected) and "None" not in found.first
    refused(lambda: windows(asked(file, len(expected) + 1), caller), f"has only {len(expected)} tokens")


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_file_line_and_way_out(tmp_path: Path, caller: Any, case: str) -> None:
    name, raw, line, words = UNREADABLE[case]
    file = write(tmp_path, name, raw)
    message = refused(lambda: windows(asked(file, 10_000), caller), f"{file}{line}", *words)
    assert ": " in message.split(str(file), 1)[1]
