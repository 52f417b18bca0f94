"""Files as people bring them: each is read to exactly the text it holds, or refused by file, line and way out.

What is right is written out by hand: texts, and what the template below makes of messages.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from llmq.data.calibration import windows
from llmq.recipe.recipe import Calibration
from tests.llmq.data.made import TOOL_TEMPLATE
from tests.llmq.refusal import refused

CHAT = [{"role": "user", "content": "see"}, {"role": "assistant", "content": "noon"}]
SAID = "<|user|>see\n<|assistant|>noon\n"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
TOOLS = '<tools>[{"type": "function", "function": {"name": "weather", "parameters": {}}}]</tools>\n'
CALLED = '<|user|>Paris?\n<|assistant|><call>weather{"city": "Paris"}</call>\n<|tool|>12\n<|assistant|>Cold.\n'


def called(content: Any = None, arguments: Any = None, **more: Any) -> list[dict[str, Any]]:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments or {"city": "Paris"}},
    }
    return [
        {"role": "user", "content": "Paris?", **more},
        {"role": "assistant", "content": content, "tool_calls": [call], **more},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "12", **more},
        {"role": "assistant", "content": "Cold.", **more},
    ]


def lines(*rows: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(*rows: list[str], **form: Any) -> bytes:
    out = io.StringIO()
    csv.writer(out, **form).writerows(rows)
    return out.getvalue().encode()


def parquet(*rows: Any) -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()


def zstd(raw: bytes, codec: str = "zstd") -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped]

    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, codec) as packed:
        packed.write(raw)
    return bytes(out.getvalue().to_pybytes())


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return out.getvalue()


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}, CHAT[1]]


SEE = lines({"text": "see"}, {"text": "noon"})
BOTH = ["see", "noon"]
TEXTS = [{"text": "see"}, {"text": "noon"}]
HUMAN = [{"from": "human", "value": "see"}, {"from": "gpt", "value": "noon"}]
TWO = [{"text": "see", "id": 1, "chat": CHAT}, {"text": "noon", "id": 2, "chat": CHAT}]

RIGHT: dict[str, tuple[str, bytes, list[str]]] = {
    "lines": ("a.jsonl", SEE, BOTH),
    "lines, capitals": ("A.JSONL", SEE, BOTH),
    "lines, ndjson": ("a.ndjson", SEE, BOTH),
    "lines, CRLF": ("a.jsonl", lines(*TEXTS, end="\r\n"), BOTH),
    "lines, blank ones between": ("a.jsonl", lines(*TEXTS, end="\n \n\n"), BOTH),
    "lines, no end of line": ("a.jsonl", SEE.rstrip(), BOTH),
    "lines, BOM": ("a.jsonl", b"\xef\xbb\xbf" + SEE, BOTH),
    "lines, UTF-16": ("a.jsonl", SEE.decode().encode("utf-16"), BOTH),
    "lines, UTF-16 of the other order": ("a.jsonl", b"\xfe\xff" + SEE.decode().encode("utf-16-be"), BOTH),
    "lines, UTF-32": ("a.jsonl", SEE.decode().encode("utf-32"), BOTH),
    "lines, gzip": ("a.jsonl.gz", gzip.compress(SEE), BOTH),
    "lines, gzip in two members": ("a.jsonl.gz", gzip.compress(SEE[:17]) + gzip.compress(SEE[17:]), BOTH),
    "lines, gzip without its ending": ("a.jsonl", gzip.compress(SEE), BOTH),
    "lines, zstd": ("a.jsonl.zst", zstd(SEE), BOTH),
    "lines, lz4": ("a.jsonl.lz4", zstd(SEE, "lz4"), BOTH),
    "lines, bz2": ("a.jsonl.bz2", bz2.compress(SEE), BOTH),
    "lines, xz": ("a.jsonl.xz", lzma.compress(SEE), BOTH),
    "lines, zip": ("a.jsonl.zip", zipped(a=SEE), BOTH),
    "lines of strings": ("a.jsonl", lines("see", "noon"), BOTH),
    "lines of chats": ("a.jsonl", lines(CHAT, CHAT), [SAID, SAID]),
    "lines, other columns": ("a.jsonl", lines({"text": "see", "n": [1], "score": float("nan")}, TEXTS[1]), BOTH),
    "lines, null and empty": ("a.jsonl", lines({"text": None}, TEXTS[0], {"text": ""}, TEXTS[1]), BOTH),
    "lines, line separators in a text": (
        "a.jsonl",
        lines({"text": "see\u2028noon\x85vu\n"}),
        ["see\u2028noon\x85vu\n"],
    ),
    "array": ("a.json", json.dumps(TEXTS).encode(), BOTH),
    "array, indented, BOM": ("a.json", b"\xef\xbb\xbf" + json.dumps(TEXTS, indent=2).encode(), BOTH),
    "array, gzip": ("a.JSON.GZ", gzip.compress(json.dumps(TEXTS).encode()), BOTH),
    "array of strings": ("a.json", b'["see",\n"noon"]', BOTH),
    "array of one long text": ("a.json", json.dumps([{"text": "see\n" * 50_000}]).encode(), ["see\n" * 50_000]),
    "objects one after the other": ("a.json", SEE, BOTH),
    "objects, indented": ("a.json", "\n".join(json.dumps(row, indent=1) for row in TEXTS).encode(), BOTH),
    "object around the rows": ("a.json", json.dumps({"version": "1", "data": TEXTS}).encode(), BOTH),
    "object that is a chat": ("a.json", json.dumps({"messages": CHAT, "tools": [TOOL]}).encode(), [TOOLS + SAID]),
    "csv": ("a.csv", table(["text", "n"], ["see", "1"], ["noon", "2"]), BOTH),
    "csv, Excel's BOM": ("a.CSV", b"\xef\xbb\xbf" + table(["text"], ["see"], ["noon"]), BOTH),
    "csv, quotes, commas, line ends": ("a.csv", table(["text"], ['a "b", c\nd'], ["noon"]), ['a "b", c\nd', "noon"]),
    "csv, numbers and NA are texts": ("a.csv", table(["text"], ["007"], ["NA"], ["1e5"]), ["007", "NA", "1e5"]),
    "csv, pandas' index": ("a.csv", table(["", "body"], ["0", "see"], ["1", "noon"]), BOTH),
    "csv, chats in JSON": ("a.csv", table(["id", "chat"], ["x", json.dumps(CHAT)]), [SAID]),
    "csv, UTF-16": ("a.csv", table(["text"], ["see"], ["noon"]).decode().encode("utf-16"), BOTH),
    "tsv": ("a.tsv", table(["text", "n"], ["see, noon", "1"], delimiter="\t"), ["see, noon"]),
    "parquet": ("a.parquet", parquet(*TEXTS), BOTH),
    "parquet, capitals": ("A.PARQUET", parquet(*TEXTS), BOTH),
    "parquet, chats": ("a.parquet", parquet({"chat": CHAT, "source": "web"}), [SAID]),
    "parquet, calls filled with nulls": (
        "a.parquet",
        parquet({"messages": called()}, {"messages": called(arguments={"town": "Paris"})}),
        [CALLED, CALLED.replace("city", "town")],
    ),
    "prose": ("a.txt", b"see\nnoon", ["see\nnoon"]),
    "prose, BOM": ("a.txt", b"\xef\xbb\xbfsee noon", ["see noon"]),
    "prose, UTF-16": ("a.md", "see d\u00e9j\u00e0".encode("utf-16"), ["see d\u00e9j\u00e0"]),
    "prose, CRLF": ("a.txt", b"see\r\nnoon\r\n", ["see\nnoon\n"]),
    "prose, gzip": ("a.txt.gz", gzip.compress(b"see noon"), ["see noon"]),
    "prose in brackets": ("a.txt", b"[1] {see} noon", ["[1] {see} noon"]),
    "chat, a column of its own": ("a.jsonl", lines({"source": "web", "dialogue": CHAT}), [SAID]),
    "chat beside a text": ("a.jsonl", lines(*TWO), [SAID, SAID]),
    "chat of which the first is missing": (
        "a.jsonl",
        lines({"source": "web", "chat": None}, {"source": "web", "chat": []}, {"source": "web", "chat": CHAT}),
        [SAID],
    ),
    "two chats": ("a.jsonl", lines({"chosen": CHAT, "rejected": CHAT[:1]}), [SAID]),
    "prompt and completion in messages": ("a.jsonl", lines({"prompt": CHAT[:1], "completion": CHAT[1:]}), [SAID]),
    "ShareGPT": ("a.jsonl", lines({"conversations": HUMAN}), [SAID]),
    "ShareGPT, calls": (
        "a.json",
        json.dumps(
            [
                {
                    "conversations": [
                        {"from": "human", "value": "Paris?"},
                        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                        {"from": "observation", "value": "12"},
                        {"from": "gpt", "value": "Cold."},
                    ],
                    "tools": json.dumps([TOOL]),
                }
            ]
        ).encode(),
        [TOOLS + CALLED],
    ),
    "tool calls, content null": ("a.jsonl", lines({"messages": called(), "tools": [TOOL]}), [TOOLS + CALLED]),
    "tool calls, content empty": ("a.jsonl", lines({"messages": called(""), "tools": []}), [CALLED]),
    "tool calls, nulls for all that is missing": (
        "a.jsonl",
        lines({"messages": called(refusal=None, function_call=None), "tools": None}),
        [CALLED],
    ),
    "tools as JSON": ("a.jsonl", lines({"messages": called(), "tools": json.dumps([TOOL])}), [TOOLS + CALLED]),
    "arguments as JSON": ("a.jsonl", lines({"messages": called(arguments='{"city": "Paris"}')}), [CALLED]),
    "arguments of different keys, an explicit null": (
        "a.jsonl",
        lines({"messages": called(arguments={"a": None})}, {"messages": called(arguments={"b": [1]})}),
        [CALLED.replace('{"city": "Paris"}', '{"a": null}'), CALLED.replace('{"city": "Paris"}', '{"b": [1]}')],
    ),
    "text parts": ("a.jsonl", lines({"messages": parts("s", "ee")}), [SAID]),
    "texts for parts": ("a.jsonl", lines({"messages": [{"role": "user", "content": ["s", "ee"]}, CHAT[1]]}), [SAID]),
}
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
    "open quote": ("a.csv", b'text\nsee\n"noon\n', ":3", ("is not CSV", "double the quotes")),
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
    "array called prose": ("a.md", b"[\n" + json.dumps(TEXTS[0]).encode() + b"]", ":2", ("rows in JSON", ".json")),
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
