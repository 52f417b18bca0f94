"""Files of rows and of prose, and the texts that each holds, written out by hand."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from typing import Any

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


MARKED = "\n\nHuman: see\n\nAssistant: noon"
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
    "worse answers before better ones": ("a.jsonl", lines({"rejected": CHAT[:1], "chosen": CHAT}), [SAID]),
    "marks of what is learned": (
        "a.jsonl",
        lines({"messages": [{**CHAT[0], "weight": 1}, {**CHAT[1], "weight": 0, "train": False}]}),
        [SAID],
    ),
    "prompt and better answer in messages": (
        "a.jsonl",
        lines({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[:1]}),
        [SAID],
    ),
    "prompt in the better answer": (
        "a.parquet",
        parquet({"prompt": CHAT[:1], "chosen": CHAT, "rejected": CHAT[:1], "score": 1.0}),
        [SAID],
    ),
    "prompt and better answer in texts": (
        "a.csv",
        table(["prompt", "chosen", "rejected"], ["see", " noon", " vu"], ["vu", " at", " a"]),
        ["see noon", "vu at"],
    ),
    "prompt in both answers": (
        "a.jsonl",
        lines({"prompt": "see", "chosen": "see noon", "rejected": "see vu"}),
        ["see noon"],
    ),
    "better answer with its prompt in a text": (
        "a.jsonl",
        lines({"chosen": "see noon", "rejected": "see vu"}),
        ["see noon"],
    ),
    "better answer with marked turns": (
        "a.jsonl.gz",
        gzip.compress(lines({"chosen": MARKED, "rejected": MARKED[:20]})),
        [MARKED],
    ),
    "messages and a better answer": (
        "a.json",
        json.dumps(
            [{"conversations": HUMAN[:1], "chosen": HUMAN[1], "rejected": {"from": "gpt", "value": "vu"}}]
        ).encode(),
        [SAID],
    ),
    "question and better answer, system": (
        "a.jsonl",
        lines({"system": "vu", "question": "see", "chosen": "noon", "rejected": "at"}),
        ["<|system|>vu\n" + SAID],
    ),
    "preference rows of OpenAI": (
        "a.jsonl",
        lines(
            {
                "input": {"messages": CHAT[:1], "tools": [TOOL]},
                "preferred_output": CHAT[1:],
                "non_preferred_output": CHAT[1:],
            }
        ),
        [TOOLS + SAID],
    ),
    "prompt and completion in texts": (
        "a.jsonl",
        lines(
            {"prompt": "see", "completion": " noon", "label": True},
            {"prompt": "see", "completion": " vu", "label": False},
        ),
        ["see noon", "see vu"],
    ),
    "two turns in an object": ("a.jsonl", lines({"conversation": [{"human": "see", "assistant": "noon"}]}), [SAID]),
    "lines, old Mac": ("a.jsonl", lines(*TEXTS, end="\r"), BOTH),
    "csv, old Mac": ("a.csv", table(["text", "n"], ["see", "1"], ["noon", "2"], lineterminator="\r"), BOTH),
    "csv, old Mac, line ends in texts": (
        "a.csv",
        table(["text", "n"], ["see\nvu", "1"], ["no,on", "2"], lineterminator="\r", quoting=csv.QUOTE_ALL),
        ["see\nvu", "no,on"],
    ),
    "csv, a return in a text": (
        "a.csv",
        table(["text"], ["see\rvu"], ["noon"], lineterminator="\n", quoting=csv.QUOTE_ALL),
        ["see\rvu", "noon"],
    ),
    "csv, Excel's separator line": ("a.csv", b"sep=,\r\ntext,n\r\nsee,1\r\n", ["see"]),
    "better answers, one missing": (
        "a.jsonl",
        lines(
            {"prompt": "see", "chosen": " noon"}, {"prompt": "see", "chosen": None}, {"prompt": "a", "chosen": " vu"}
        ),
        ["see noon", "a vu"],
    ),
    "prose after an object": ("a.txt", b'{"a": 1}\n\nsee noon', ['{"a": 1}\n\nsee noon']),
    "prose that starts with braces": ("a.txt", b'{} see {"a": 1}', ['{} see {"a": 1}']),
    "prose that starts with an object": ("a.txt", b'{"a": 1} is see\nnoon', ['{"a": 1} is see\nnoon']),
    "prose that starts with an array": ("a.md", b"[1] see\n[2] noon", ["[1] see\n[2] noon"]),
    "prose in quotes": ("a.txt", b'"see"\n"noon"\n', ['"see"\n"noon"\n']),
    "prose with a quote and an escape": ("a.txt", b'"see"\n"C:\\new" noon', ['"see"\n"C:\\new" noon']),
    "prose that starts like markup": ("a.txt", b"<see> noon </see>", ["<see> noon </see>"]),
    "prose, a program": ("a.py", b"see = {'a': [1]}\n", ["see = {'a': [1]}\n"]),
    "prose, no ending": ("README", b"see\nnoon", ["see\nnoon"]),
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
