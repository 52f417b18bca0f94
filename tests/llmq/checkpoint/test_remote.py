"""Weights that are read from a hub on loopback as they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmq.checkpoint import remote
from llmq.checkpoint.remote import Remote, open_remote
from llmq.checkpoint.tensors import encode
from llmq.errors import LlmqError
from tests.llmq.hub_client import HubClient
from tests.llmq.hub_server import HubServer, Repo

VALUES = {
    name: torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for seed, (name, shape) in enumerate({"a": (300, 100), "b": (70,), "c": (4, 0), "d": (1000, 70)}.items())
}
HASHES = {name: hashlib.sha256(bytes(value.flatten().tolist())).hexdigest() for name, value in VALUES.items()}


def shard(*names: str) -> bytes:
    """A safetensors file."""
    return b"".join(encode({name: VALUES[name] for name in names})[1])


SHARDS = {"one.safetensors": shard("a", "b"), "two.safetensors": shard("c", "d")}
INDEX = json.dumps(
    {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}}
).encode()
FILES = {"config.json": b"{}", "model.safetensors.index.json": INDEX, "tokenizer.json": b"{}", **SHARDS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def running(cache: Path) -> Iterator[tuple[HubServer, HubClient]]:
    with HubServer() as server, HubClient(server.url, cache) as found:
        yield server, found


@pytest.fixture
def hub(running: tuple[HubServer, HubClient]) -> HubServer:
    running[0].models.clear()
    running[0].forget()
    return running[0]


@pytest.fixture
def client(running: tuple[HubServer, HubClient]) -> HubClient:
    return running[1]


def test_tensors_come_by_their_bytes_and_no_weight_is_on_the_disk(
    hub: HubServer, client: HubClient, cache: Path
) -> None:
    """In one request each or in pieces side by side; connections that break in a piece go on where they broke."""
    hub.models["org/big"] = Repo(FILES)
    whole = client.ask(do="remote", model="org/big", piece=1 << 25)["value"]
    assert whole["hashes"] == HASHES
    assert "hub" in whole["warnings"][0]
    assert hub.served["one.safetensors"] < 3 * len(SHARDS["one.safetensors"])
    hub.models["org/big"].drops = {"one.safetensors": 3, "two.safetensors": 2}
    pieces = client.ask(do="remote", model="org/big", piece=9_000)["value"]
    assert (pieces["hashes"], pieces["fingerprint"]) == (HASHES, whole["fingerprint"])
    assert (Path(whole["folder"]) / "tokenizer.json").exists()
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 2_000]


def test_rows_alone_are_fetched(hub: HubServer, client: HubClient) -> None:
    hub.models["org/one"] = Repo({"config.json": b"{}", "model.safetensors": shard("d")})
    found = client.ask(do="remote", model="org/one", piece=1 << 25, rows=[3, 5])["value"]
    assert found["hashes"] == {"d": hashlib.sha256(bytes(VALUES["d"][3:5].flatten().tolist())).hexdigest()}
    assert hub.ranges[-1].endswith(str(int(hub.ranges[-1][6:].split("-")[0]) + 139))


def test_other_weights_have_another_fingerprint(hub: HubServer, client: HubClient) -> None:
    found = []
    for names in (("a",), ("d",)):
        hub.models["org/one"] = Repo({"config.json": b"{}", "model.safetensors": shard(*names)})
        found.append(client.ask(do="remote", model="org/one", piece=1 << 25)["value"]["fingerprint"])
    assert found[0] != found[1]


def test_a_connection_that_always_breaks_ends_with_the_file_and_the_way_out(hub: HubServer, client: HubClient) -> None:
    hub.models["org/big"] = Repo(FILES, drops={"two.safetensors": 1_000})
    answer = client.ask(do="remote", model="org/big", piece=1 << 25)
    assert answer["error"] == "LlmqError", answer
    assert all(word in answer["text"] for word in ("two.safetensors", "broke 4 times", "same command"))


@pytest.mark.parametrize("name", ["demo", ".", "./absent"])
def test_what_is_not_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(LlmqError, match="leave it out"):
        open_remote(name)


def test_a_shard_that_is_no_safetensors_file(hub: HubServer, client: HubClient) -> None:
    hub.models["org/bad"] = Repo({"config.json": b"{}", "model.safetensors": SHARDS["two.safetensors"][:-5]})
    answer = client.ask(do="remote", model="org/bad", piece=1 << 25)
    assert answer["error"] == "LlmqError" and "truncated" in answer["text"]


@pytest.mark.parametrize("kind", ["refused", "closed"])
def test_a_hub_that_is_gone_for_long_leaves_the_run_to_be_resumed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As it may be in the middle of a run; a client that another thread has closed is one that is asked again."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    problem = httpx.ConnectError("refused") if kind == "refused" else RuntimeError("the client has been closed.")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    file: Any = SimpleNamespace(rfilename="model.safetensors", size=100, lfs=None, blob_id="b")
    info: Any = SimpleNamespace(sha="s", siblings=[file])
    store, asked = Remote("org/one", info, Path("/x"), ["model.safetensors"], None), list[int]()

    def answer(path: Path, begin: int, into: memoryview) -> tuple[int, None]:
        asked.append(begin)
        if len(asked) % 5 == 1:
            return 10, None
        raise problem

    monkeypatch.setattr(store, "_answer", answer)
    with pytest.raises(LlmqError, match="broke 4 times at byte 10 .* run the same command again"):
        store.read(Path("/x/model.safetensors"), 0, memoryview(bytearray(100)))
    assert asked == [0, 10, 10, 10, 10]
