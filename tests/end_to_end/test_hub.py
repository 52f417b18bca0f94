"""`llmq quantize org/name --calib org/texts`: the whole command against a hub on loopback."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.conftest import WORDS
from tests.forked import Command, Server
from tests.llmq.hub_server import HubServer, Repo

FILES = 40


def texts(rows: int) -> dict[str, bytes]:
    """A data set of many .jsonl files, which differ in their first rows."""
    rng = random.Random(0)

    def lines(count: int) -> bytes:
        return "".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) + "\n" for _ in range(count)).encode()

    rest = lines(rows - 20)
    return {f"train-{i:03d}.jsonl": lines(20) + rest for i in range(FILES)}


def started(hub: HubServer, folder: Path) -> Server:
    """Processes with the hub's address and an empty cache."""
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    return Server(folder / "forked", **places, HF_HUB_DISABLE_XET="1")


def quantize(server: Server, *arguments: object) -> Command:
    """The command in a process of its own."""
    return server.run("quantize", *arguments, "--group-size", 32, "--samples", 8, "--seqlen", 64)


@pytest.mark.slow
def test_by_hub_id(tiny_model: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.models["org/tiny"] = Repo({p.name: p.read_bytes() for p in tiny_model.iterdir()}, drops={"config.json": 1})
        hub.models["org/gated"] = Repo({"config.json": b"{}"}, gated=True)
        hub.datasets["org/texts"] = Repo(texts(2000))
        out = tmp_path / "out"
        server = started(hub, tmp_path)
        done = quantize(server, "org/tiny", "-o", out, "--calib", "org/texts")
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "report.json").read_text())["calibration"].startswith("org/texts")
        assert "base_model: org/tiny" in (out / "README.md").read_text()
        sizes = {name: len(data) for name, data in hub.datasets["org/texts"].files.items()}
        served = sum(size for name, size in hub.served.items() if name in sizes)
        assert served < sum(sizes.values()) / 4
        streamed = quantize(server, "org/tiny", "-o", tmp_path / "streamed", "--calib", "org/texts", "--stream-hub")
        assert streamed.returncode == 0, streamed.stderr
        for file in out.glob("*.safetensors"):
            assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes()
        for name, word in (("org/gated", "gated"), ("org/absent", "org/absent")):
            refused = quantize(server, name, "-o", tmp_path / "no", "--calib", "org/texts")
            assert refused.returncode == 2
            assert word in " ".join(refused.stderr.split())
            assert "Traceback" not in refused.stderr
            assert not (tmp_path / "no").exists()
        server.close()
