"""`llmq push`: what is refused before anything is sent, and what arrives at a small hub on loopback."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmq
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.push import check
from llmq.recipe.recipe import Calibration, Recipe
from tests.conftest import Run
from tests.llmq.hub_client import HubClient
from tests.llmq.hub_server import HubServer, Repo


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder; do not change it."""
    out = tmp_path_factory.mktemp("push") / "tiny-w4"
    llmq.quantize(str(tiny_model), out, Recipe(("rtn",), Scheme(4, 32), calibration=Calibration("demo", 1, 32)))
    return out


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny-w4"))


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.writers = {"hf_writer"}
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    with HubClient(hub.url, tmp_path_factory.mktemp("hf_home")) as found:
        yield found


@pytest.mark.slow
def test_everything_arrives(hub: HubServer, client: HubClient, folder: Path) -> None:
    options = {"private": True, "revision": "w4", "message": "four bits"}
    here = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    here["additional_chat_templates/rag.jinja"] = b"{{ messages }}"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    for stray in (".env", "token.txt", "run.log"):
        (folder / stray).write_text("hf_secret")
    answer = client.ask(do="push", folder=str(folder), repo="org/tiny-w4", token="hf_writer", options=options)
    assert answer.get("value", "").startswith(f"{hub.url}/org/tiny-w4/commit/"), answer
    there = hub.models["org/tiny-w4"]
    assert there.private and there.branches == {"w4"} and there.messages == ["four bits"]
    here["README.md"] = (folder / "README.md").read_bytes()  # its example now names the repository
    assert there.files == here  # and nothing of .llmq/, nor what only lies there
    assert {"report.html", "report.json", "config.json"} <= here.keys()
    assert here["README.md"].count(b'path = "org/tiny-w4"') == 2 and b"PATH_TO" not in here["README.md"]
    sent = hub.requests["POST batch"], len(hub.objects)
    again = client.ask(do="push", folder=str(folder), repo="org/tiny-w4", token="hf_writer")
    assert "value" in again and len(hub.objects) == sent[1]  # what is there is not sent again


@pytest.mark.slow
def test_a_public_repository_does_not_take_a_private_folder(hub: HubServer, client: HubClient, folder: Path) -> None:
    hub.models["org/open"] = Repo({})
    answer = client.ask(do="push", folder=str(folder), repo="org/open", token="hf_writer", options={"private": True})
    assert answer["error"] == "LlmqError" and "public" in answer["text"]
    assert not hub.models["org/open"].files


@pytest.mark.parametrize(("token", "words"), [("", "hf auth login"), ("hf_reader", "may not write to org/no")])
def test_logins(hub: HubServer, client: HubClient, folder: Path, token: str, words: str) -> None:
    answer = client.ask(do="push", folder=str(folder), repo="org/no", token=token)
    assert answer["error"] == "LlmqError" and words in answer["text"], answer
    assert "org/no" not in hub.models


@pytest.mark.slow
def test_no_network(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with HubClient(f"http://127.0.0.1:{port}", tmp_path / "home") as offline:
        answer = offline.ask(do="push", folder=str(folder), repo="org/tiny", token="hf_writer")
    assert answer["error"] == "LlmqError" and "cannot be reached" in answer["text"], answer


def damage(folder: Path, what: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    if what == "flip":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif what == "cut":
        shutil.rmtree(folder / ".llmq")
        shard.write_bytes(shard.read_bytes()[:-8])
    elif what == "shard":
        shutil.rmtree(folder / ".llmq")
        shard.unlink()
    elif what == "index":
        shutil.rmtree(folder / ".llmq")
        (folder / "model.safetensors.index.json").unlink()
    elif what == "unfinished":
        journal = folder / ".llmq" / "journal.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    elif what == "report":
        shutil.rmtree(folder / ".llmq")
        (folder / "report.json").unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("flip", "was changed since it was written"),
        ("cut", "bytes"),
        ("shard", "is missing"),
        ("index", "no model.safetensors.index.json"),
        ("unfinished", "is not finished"),
        ("report", "has no report.json"),
    ],
)
def test_damaged_folders(folder: Path, what: str, words: str, llmq: Run) -> None:
    damage(folder, what)
    done = llmq("push", folder, "org/never")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in " ".join(done.stderr.split()), done.stderr
    assert str(folder) in "".join(done.stderr.split())


def test_a_report_of_other_weights(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"bytes": report["bytes"] + 4}))
    with pytest.raises(LlmqError, match="of different runs"):
        check(folder)


def test_whole_folders_pass(finished: Path, folder: Path) -> None:
    check(finished)
    shutil.rmtree(folder / ".llmq")  # as copied from another machine
    check(folder)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "org/", "org/na me"])
def test_names_of_repositories(folder: Path, name: str, llmq: Run) -> None:
    done = llmq("push", folder, name)
    assert done.returncode == 2 and "NAME/MODEL" in " ".join(done.stderr.split())
