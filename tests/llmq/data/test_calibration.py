"""Calibration windows: the same as the other tools', packed, and refused in one clear line where they cannot be had."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.data import calibration as module
from llmq.data.calibration import windows
from llmq.errors import LlmqError
from llmq.recipe.recipe import Calibration
from tests.llmq.data.made import text
from tests.llmq.refusal import refused

SHARED = Path(__file__).parents[4] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside this checkout")


def asked(file: Path | str, samples: int = 4, seqlen: int = 32, **more: Any) -> Calibration:
    return Calibration(text=str(file), samples=samples, seqlen=seqlen, **more)


def peer_windows(file: Path, tokenizer: Any, samples: int, seqlen: int) -> list[list[int]]:
    """What every peer is given: samples() of ../shared/peers/common.py."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    n = len(ids) // seqlen
    k = min(samples, n)
    return [ids[i * seqlen : (i + 1) * seqlen] for i in (j * n // k for j in range(k))]


def test_text_is_cut_as_for_the_peers(tmp_path: Path, bpe: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text(5000), encoding="utf-8")
    for samples, seqlen in ((4, 32), (7, 100), (1, 17)):
        found = windows(asked(file, samples, seqlen), bpe, seed=0)
        assert found.ids.dtype == torch.int64
        assert found.ids.tolist() == peer_windows(file, bpe, samples, seqlen)
        assert not found.notes and str(file) in found.description
    other = windows(asked(file, 4, 33), bpe, seed=0)
    assert len({found.digest, other.digest, windows(asked(file, 1, 17), bpe, seed=0).digest}) == 2


@needs_shared
def test_the_peers_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.syspath_prepend(str(SHARED / "peers"))
    common: Any = __import__("common")
    calib = SHARED / "data" / "books" / "calibration.txt"
    short = types.SimpleNamespace(calib=str(calib), nsamples=8, seqlen=256)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "books8m")
    whole = calib.read_text(encoding="utf-8")
    monkeypatch.setattr(common, "open", lambda *_, **__: __import__("io").StringIO(whole[:150_000]), raising=False)
    monkeypatch.setattr(module, "_read", lambda _: whole[:150_000].encode())
    found = windows(asked(calib, 8, 256), tokenizer, seed=0)
    assert found.ids.tolist() == common.samples(short, tokenizer)


def test_large_file_is_read_at_places(tmp_path: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", 1000)
    file = tmp_path / "large.txt"
    file.write_text(text(20000), encoding="utf-8")
    found = windows(asked(file, 5, 64), bpe, seed=0)
    whole = file.read_text(encoding="utf-8")
    assert found.ids.shape == (5, 64)
    begins = [whole.index(bpe.decode(window)[:-4]) / len(whole) for window in found.ids.tolist()]
    assert begins == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.01)
    file.write_text("é" * 3000, encoding="utf-8")  # no line ends, and places in the middle of characters
    assert windows(asked(file, 7, 16), bpe, seed=0).ids.shape == (7, 16)


def test_fewer_windows_than_asked(tmp_path: Path, bpe: Any) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text(100), encoding="utf-8")
    found = windows(asked(file, 50, 32), bpe, seed=0)
    assert 0 < len(found.ids) < 50
    assert "not the 50 asked for" in found.notes[0] and str(file) in found.notes[0]


def write_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "body", None])
def test_rows_are_joined_by_the_end_token(tmp_path: Path, bpe: Any, kind: str, column: str | None) -> None:
    texts = [text(30, seed) if seed % 5 else "" for seed in range(200)]
    rows = [{column or "only": content, "id": i} for i, content in enumerate(texts)]
    file = write_rows(tmp_path, kind, rows)
    found = windows(asked(file, 6, 50, column="body" if column == "body" else None), bpe, seed=0)
    expected: list[int] = []
    for content in filter(None, texts):
        expected += [*bpe(content, add_special_tokens=False)["input_ids"], bpe.eos_token_id]
    assert found.ids.flatten().tolist() == expected[:300]
    assert "the first" in found.description


def test_rows_are_joined_by_a_blank_line_without_an_end_token(tmp_path: Path, plain: Any) -> None:
    file = write_rows(tmp_path, "jsonl", [{"text": "see"}, {"text": "noon"}] * 20)
    assert plain.decode(windows(asked(file, 1, 12), plain, seed=0).ids[0]).startswith("see\n\nnoon\n\nsee")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "see"}, {"role": "assistant", "content": "noon"}], "source": "x"},
        {"conversations": [{"from": "human", "value": "see"}, {"from": "gpt", "value": "noon"}], "source": "x"},
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_go_through_the_template(tmp_path: Path, bpe: Any, row: dict[str, Any], kind: str) -> None:
    file = write_rows(tmp_path, kind, [row] * 30)
    found = windows(asked(file, 1, 60), bpe, seed=0)
    assert bpe.decode(found.ids[0]).startswith("[user] see\n[assistant] noon\n<end>[user] see")


def test_chats_that_the_template_refuses_are_counted(tmp_path: Path, bpe: Any) -> None:
    good, bad = ([{"role": role, "content": "see"}] for role in ("user", "tool"))
    file = write_rows(tmp_path, "jsonl", [{"messages": bad}] * 3 + [{"messages": good}] * 30)
    found = windows(asked(file, 2, 16), bpe, seed=0)
    assert found.ids.shape == (2, 16)
    assert "refused 3 rows" in found.notes[0] and "no tools" in found.notes[0]
    with pytest.raises(LlmqError, match="refused 3 rows"):
        windows(asked(write_rows(tmp_path, "jsonl", [{"messages": bad}] * 3)), bpe, seed=0)


def test_rows_are_read_only_as_far_as_needed(tmp_path: Path, bpe: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps({"text": text(50)}) + "\n") * 5 + "not json\n")
    assert windows(asked(file, 2, 16), bpe, seed=0).ids.shape == (2, 16)


Writer = Callable[[Path], object]
BAD: dict[str, tuple[str, Writer, str]] = {
    "empty": ("a.txt", lambda f: f.write_text(""), "empty"),
    "only blanks": ("a.txt", lambda f: f.write_text(" \n\n "), "empty"),
    "too short": ("a.txt", lambda f: f.write_text("see noon"), "tokens, and one window needs 32: lower --seqlen"),
    "not UTF-8": ("a.txt", lambda f: f.write_bytes(b"noon \xff\xfe"), "not UTF-8"),
    "binary": ("a.bin", lambda f: f.write_bytes(b"noon\0noon"), "binary"),
    "folder": ("folder", lambda f: f.mkdir(), "is a folder"),
    "no such file": ("none.txt", lambda f: None, "no such file"),
    "no such path": ("none/at/all", lambda f: None, "no such file"),
    "malformed": ("a.jsonl", lambda f: f.write_text('{"text": "see"}\n{"text": \n'), "a.jsonl:2 is not JSON"),
    "no object": ("a.jsonl", lambda f: f.write_text("[1]\n"), "a.jsonl:1 is not a JSON object"),
    "bad bytes": ("a.jsonl", lambda f: f.write_bytes(b'\n{"text": "\xff"}\n'), "a.jsonl:2 is not UTF-8"),
    "no rows": ("a.jsonl", lambda f: f.write_text("\n"), "empty"),
    "no text": ("a.jsonl", lambda f: f.write_text('{"x": 1, "y": 2}'), "no column of text, its columns are x, y"),
    "two texts": ("a.jsonl", lambda f: f.write_text('{"x": "a", "y": "b"}'), "more than one column of text"),
    "column goes": ("a.jsonl", lambda f: f.write_text('{"text": "a"}\n{"x": "b"}'), "a.jsonl:2 has no column 'text'"),
    "no value": ("a.jsonl", lambda f: f.write_text('{"text": "a"}\n{"text": 1}'), "a.jsonl:2: column 'text' holds"),
    "no parquet": ("a.parquet", lambda f: f.write_text("hello"), "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_file_in_one_line(tmp_path: Path, bpe: Any, case: str) -> None:
    name, write, words = BAD[case]
    file = tmp_path / name
    write(file)
    with pytest.raises(LlmqError) as caught:
        windows(asked(file), bpe, seed=0)
    assert words in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_of_a_text_without_columns_is_refused(tmp_path: Path, bpe: Any) -> None:
    (tmp_path / "a.txt").write_text(text(100))
    for file in ("demo", tmp_path / "a.txt"):
        with pytest.raises(LlmqError, match="has no column 'body': name"):
            windows(asked(file, column="body"), bpe)


def test_large_and_compressed_is_refused(tmp_path: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", 10)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text(100).encode()))
    with pytest.raises(LlmqError, match="large and compressed: unpack it"):
        windows(asked(tmp_path / "a.txt.gz"), bpe)


def test_a_large_file_with_a_mark(tmp_path: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", 1000)
    file = tmp_path / "large.txt"
    file.write_text("\ufeff" + text(2000), encoding="utf-8")
    found = windows(asked(file, 2, 16), bpe)
    assert found.first and text(2000).startswith(found.first)
    file.write_text(text(2000), encoding="utf-16")
    with pytest.raises(LlmqError, match="save it as UTF-8"):
        windows(asked(file, 2, 16), bpe)


def test_chats_need_a_template(tmp_path: Path, plain: Any) -> None:
    file = write_rows(tmp_path, "jsonl", [{"messages": [{"role": "user", "content": "see"}]}])
    with pytest.raises(LlmqError, match="no chat template"):
        windows(asked(file), plain, seed=0)


def test_nothing_asked(bpe: Any) -> None:
    for samples, seqlen in ((0, 32), (4, 1)):
        with pytest.raises(LlmqError, match="--samples or --seqlen"):
            windows(asked("demo", samples, seqlen), bpe, seed=0)


def test_demo_text(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmq import demo

    start = demo.calibration_text()[:20_000]
    monkeypatch.setattr(demo, "calibration_text", lambda: start)
    assert windows(asked("demo", 3, 64), bpe, seed=0).ids.shape == (3, 64)


@pytest.mark.slow
def test_heavy_packages_wait_until_needed() -> None:
    code = (
        "import sys, llmq.data.calibration, llmq.checkpoint.hub\n"
        "print([m for m in ('datasets', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (json.dumps({"text": "see noon " * 150_000}), True),
        (json.dumps([{"text": "see noon " * 150_000}]), True),
        (json.dumps(["see, noon"] * 150_000), True),
        ("[" + "1, " * 400_000, True),
        ('"see\\nnoon"\n' * 100_000, True),
        ("{see} " + "noon " * 250_000, False),
        ('{"see": noon} ' + "noon " * 250_000, False),
        ("[1] see, noon\n" * 100_000, False),
        ('["see", "noon" ' + "vu " * 400_000, False),
        ('"see noon"\n' * 150_000, False),
        ("[" * 1_500_000, False),
    ],
)
def test_long_texts_are_known_as_json_by_their_start(tmp_path: Path, bpe: Any, text: str, rows: bool) -> None:
    file = tmp_path / "a.txt"
    assert len(text) > module._LOOKED_AT
    if rows:
        refused(lambda: module._refuse_rows(file, text, True), f"{file}:1 holds rows in JSON")
        refused(lambda: module._refuse_rows(file, text, False), f"{file}:1 holds rows in JSON")
    else:
        module._refuse_rows(file, text, True)
        module._refuse_rows(file, text, False)
