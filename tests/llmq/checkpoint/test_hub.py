"""Models and calibration text by hub id, from a small hub on loopback."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmq.checkpoint import hub as hub_module
from llmq.checkpoint.hub import _beside, is_path, resolve
from llmq.errors import LlmqError
from tests.conftest import write_tokenizer
from tests.llmq.hub_client import HubClient
from tests.llmq.hub_server import HubServer, Repo

SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 300_000 for i in (1, 2)}
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
PLAIN = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"abc",
    "LICENSE": b"free",
    "chat_template.jinja": b"x",
    "extra/chat.jinja": b"y",
    "README.md": b"read me",
    "own_code.py": b"print()",
    "pytorch_model.bin": b"\x80" * 100_000,
    "extra/model.safetensors": b"z" * 100_000,
    "consolidated.safetensors": b"c" * 100_000,
    "model.safetensors": b"w" * 200_000,
}
BIG = bytes(range(256)) * 100_000
"""So large that half of it is more than the pieces (10 MB) that huggingface_hub writes."""
LINE = "the quick brown fox jumps over a lazy dog, again and again, number {}"


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Paris"}}}],
}
CHATS = [
    {
        "id": "a",
        "dialogue": [{"role": "user", "content": "see"}, CALL],
        "tools": [{"name": "f", "parameters": {"x": 1}}],
    },
    {"id": "b", "dialogue": [{"role": "user", "content": "noon", "name": "g"}], "tools": [{"name": "h"}]},
]
"""Rows whose objects have different keys."""


def text_files(count: int, lines: int) -> dict[str, bytes]:
    """A data set of `count` jsonl files."""
    return {
        f"data/train-{i:03}.jsonl": "".join(
            json.dumps({"text": LINE.format(i * lines + j)}) + "\n" for j in range(lines)
        ).encode()
        for i in range(count)
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.models = {
            "org/plain": Repo(dict(PLAIN)),
            "org/sharded": Repo({**SHARDS, "model.safetensors.index.json": INDEX, "config.json": b"{}"}),
            "org/broken": Repo({"model.safetensors.index.json": INDEX, "config.json": b"{}"}),
            "org/dropped": Repo({"config.json": b"{}", "model.safetensors": BIG}),
            "org/reset": Repo({"config.json": b"{}", "model.safetensors": BIG}, reset=True),
            "org/gated": Repo(dict(PLAIN), gated=True),
            "org/pickle": Repo({"config.json": b"{}", "pytorch_model.bin": b"\x80" * 1000}),
            "org/adapter": Repo({"config.json": b"{}", "adapter_model.safetensors": b"a"}),
            "org/empty": Repo({"README.md": b"soon"}),
        }
        server.datasets = {
            "org/texts": Repo(text_files(20, 4000)),
            "org/dropped": Repo(text_files(2, 2000), reset=True),
            "org/gated": Repo(text_files(1, 10), gated=True),
            "org/chats": Repo({"train.jsonl": "".join(json.dumps(row) + "\n" for row in CHATS).encode()}),
            "org/numbers": Repo({"train.jsonl": b'{"x": 1, "y": 2}\n' * 10}),
        }
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def client(hub: HubServer, cache: Path) -> Iterator[HubClient]:
    with HubClient(hub.url, cache) as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return str(folder)


def refusal(answer: dict[str, object]) -> str:
    assert answer.get("error") in ("LlmqError", "Unreachable"), answer
    text = str(answer["text"])
    assert "\n" not in text
    return text


def test_model_files(hub: HubServer, client: HubClient) -> None:
    folder = Path(client.ask(do="resolve", model="org/plain")["value"])
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {
        "config.json", "tokenizer.json", "tokenizer.model", "LICENSE", "chat_template.jinja", "extra/chat.jinja",
        "model.safetensors", "README.md",
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    hub.forget()
    assert client.ask(do="resolve", model="org/plain")["value"] == str(folder)
    assert not hub.served  # from the cache


def test_own_code_only_when_trusted(client: HubClient) -> None:
    folder = Path(client.ask(do="resolve", model="org/plain", trust_remote_code=True)["value"])
    assert (folder / "own_code.py").exists()


def test_shards_of_the_index(client: HubClient) -> None:
    folder = Path(client.ask(do="resolve", model="org/sharded")["value"])
    for name, data in SHARDS.items():
        assert (folder / name).read_bytes() == data
    assert (folder / "model.safetensors.index.json").read_bytes() == INDEX


def test_index_names_an_absent_shard(hub: HubServer, client: HubClient) -> None:
    assert "model-00001-of-00002.safetensors" in refusal(client.ask(do="resolve", model="org/broken"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["org/dropped", "org/reset"])
def test_dropped_connection_goes_on(hub: HubServer, client: HubClient, name: str) -> None:
    repo = hub.models[name]
    repo.drops["model.safetensors"] = 1
    hub.forget()
    folder = Path(client.ask(do="resolve", model=name)["value"])
    assert (folder / "model.safetensors").read_bytes() == repo.files["model.safetensors"]
    assert not repo.drops["model.safetensors"]
    # huggingface_hub itself goes on after an orderly close; after a reset it gives up, and llmq tries again.
    assert hub.ranges == [] if repo.reset else hub.ranges[0].removeprefix("bytes=").split("-")[0] != "0"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/gated", ("gated", "hf auth login")),
        ("org/missing", ("no such model", "no such folder", "spelling")),
        ("org/pickle", ("pytorch_model.bin", "pickled", "safetensors")),
        ("org/adapter", ("adapter_model.safetensors", "adapter")),
        ("org/empty", ("config.json",)),
    ],
)
def test_refused_models(hub: HubServer, client: HubClient, name: str, words: tuple[str, ...]) -> None:
    hub.forget()
    text = refusal(client.ask(do="resolve", model=name))
    assert name in text
    for word in words:
        assert word in text
    assert not hub.served  # refused before anything was fetched


@pytest.mark.slow
def test_calibration_is_streamed(hub: HubServer, client: HubClient, tokenizer: str) -> None:
    hub.forget()
    calibration = {"text": "org/texts", "samples": 8, "seqlen": 128}
    answer = client.ask(do="windows", tokenizer=tokenizer, calibration=calibration)
    found = answer["value"]
    assert [len(found["ids"]), len(found["ids"][0]), found["notes"]] == [8, 128, []]
    total = sum(map(len, hub.datasets["org/texts"].files.values()))
    assert 0 < sum(hub.served.values()) < total / 5
    expected = [byte for i in range(100) for byte in (LINE.format(i) + "\n\n").encode()][: 8 * 128]
    # The tokenizer's ids are the alphabet's order, not the bytes; decode to compare.
    from transformers import AutoTokenizer

    flat = [token for window in found["ids"] for token in window]
    assert AutoTokenizer.from_pretrained(tokenizer).decode(flat) == bytes(expected).decode()


@pytest.mark.slow
def test_a_chat_on_the_hub_is_what_it_is_in_a_file(client: HubClient, tokenizer: str, tmp_path: Path) -> None:
    """`datasets` gives all rows of a column the same keys; the template must not see them."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ tools | tojson(sort_keys=true) }}{{ messages | tojson(sort_keys=true) }}"
    )
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    found = []
    for text in ("org/chats", str(tmp_path / "chats.jsonl")):
        calibration = {"text": text, "samples": 1, "seqlen": 240}
        answer = client.ask(do="windows", tokenizer=str(folder), calibration=calibration)
        assert "value" in answer, answer
        found.append(answer["value"])
    assert found[0]["ids"] == found[1]["ids"] and found[0]["notes"] == []
    assert "column 'dialogue'" in found[0]["description"]


@pytest.mark.slow
def test_calibration_outlives_a_dropped_connection(hub: HubServer, client: HubClient, tokenizer: str) -> None:
    repo = hub.datasets["org/dropped"]
    path = next(iter(repo.files))
    repo.drops[path] = 1
    calibration = {"text": "org/dropped", "samples": 4, "seqlen": 128}
    answer = client.ask(do="windows", tokenizer=tokenizer, calibration=calibration)
    assert len(answer["value"]["ids"]) == 4
    assert not repo.drops[path]


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"text": "org/gated"}, ("org/gated", "gated", "hf auth login")),
        ({"text": "org/missing"}, ("org/missing", "no such data set", "no such file")),
        ({"text": "org/numbers"}, ("org/numbers", "x, y", "column")),
        ({"text": "org/texts", "split": "nowhere"}, ("org/texts", "nowhere", "split")),
        ({"text": "org/texts:other"}, ("org/texts", "other")),
    ],
)
def test_refused_data_sets(
    client: HubClient, tokenizer: str, calibration: dict[str, str], words: tuple[str, ...]
) -> None:
    text = refusal(
        client.ask(do="windows", tokenizer=tokenizer, calibration={**calibration, "samples": 1, "seqlen": 8})
    )
    for word in words:
        assert word in text


@pytest.mark.slow
def test_no_network(client: HubClient, cache: Path, tokenizer: str) -> None:
    cached = client.ask(do="resolve", model="org/plain")["value"]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with HubClient(f"http://127.0.0.1:{port}", cache) as offline:
        assert offline.ask(do="resolve", model="org/plain")["value"] == cached  # the cache still serves
        calibration = {"text": "org/texts", "samples": 1, "seqlen": 8}
        questions: tuple[dict[str, object], ...] = (
            {"do": "resolve", "model": "org/else"},
            {"do": "windows", "tokenizer": tokenizer, "calibration": calibration},
        )
        for question in questions:
            offline.ask(**question)  # imports what it needs
            begin = time.monotonic()
            assert "cannot be reached" in refusal(offline.ask(**question))
            assert time.monotonic() - begin < 5


def test_downloads_that_cannot_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    waits: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)

    def reset() -> str:
        raise httpx.ReadError("reset")

    def full() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LlmqError, match="org/name.*broke 4 times.*same command"):
        hub_module._retried(reset, "org/name")
    assert waits == [1, 2, 4]
    with pytest.raises(LlmqError, match="org/name.*disk is full"):
        hub_module._retried(full, "org/name")


def test_too_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    hub_module._check_disk("org/name", "0" * 40, {"model.safetensors": 2**30})
    with pytest.raises(LlmqError, match=r"needs 3.0 GiB.*1.0 GiB are free.*HF_HOME"):
        hub_module._check_disk("org/name", "0" * 40, {"model.safetensors": 3 * 2**30})


def test_paths(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("demo").is_dir()
    for path in ("./model", "~/model", "/model", "a/b/c", "model/", "../x", "my model"):
        assert is_path(path)
        if not path.startswith("~"):
            with pytest.raises(LlmqError, match="no such folder"):
                resolve(str(tmp_path / path))
    assert not is_path("org/name") and not is_path("name") and not is_path("org/name-1.5_B")
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmqError, match="is a file"):
        resolve(str(tmp_path / "file"))


def test_parts_beside_a_model_are_fetched_where_a_file_lists_them() -> None:
    files = {"modules.json": 1, "1_Pooling/config.json": 1, "onnx/model.onnx": 1, "model.safetensors": 1}
    assert _beside("1_Pooling/config.json", files) and _beside("2_Dense/model.safetensors", files)
    for other in ("onnx/model.onnx", "model.safetensors", "a/b/config.json", "1_Pooling/pytorch_model.bin"):
        assert not _beside(other, files)
    assert not _beside("1_Pooling/config.json", {"model.safetensors": 1})
