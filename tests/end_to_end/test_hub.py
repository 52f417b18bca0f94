"""`llmq quantize org/name --calib org/texts`: the whole command against a hub on loopback."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WORDS
from tests.llmq.hub_server import HubServer, Repo

FILES = 40


def texts(rows: int) -> dict[str, bytes]:
    """A data set of many .jsonl files."""
    rng = random.Random(0)

    def lines() -> bytes:
        return "".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) + "\n" for _ in range(rows)).encode()

    return {f"train-{i:03d}.jsonl": lines() for i in range(FILES)}


def quantize(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the hub's address and an empty cache."""
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    options = ["--group-size", "32", "--samples", "8", "--seqlen", "64"]
    return subprocess.run(
        [sys.executable, "-m", "llmq.cli", "quantize", *arguments, *options],
        capture_output=True,
        text=True,
        env=os.environ | places,
        check=False,
    )


@pytest.mark.slow
def test_by_hub_id(tiny_model: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.models["org/tiny"] = Repo({p.name: p.read_bytes() for p in tiny_model.iterdir()}, drops={"config.json": 1})
        hub.models["org/gated"] = Repo({"config.json": b"{}"}, gated=True)
        hub.datasets["org/texts"] = Repo(texts(2000))
        out = tmp_path / "out"
        done = quantize(hub, tmp_path / "home", "org/tiny", "-o", str(out), "--calib", "org/texts")
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "report.json").read_text())["calibration"].startswith("org/texts")
        assert "base_model: org/tiny" in (out / "README.md").read_text()
        sizes = {name: len(data) for name, data in hub.datasets["org/texts"].files.items()}
        served = sum(size for name, size in hub.served.items() if name in sizes)
        assert served < sum(sizes.values()) / 4
        for name, word in (("org/gated", "gated"), ("org/absent", "org/absent")):
            refused = quantize(hub, tmp_path / "home", name, "-o", str(tmp_path / "no"), "--calib", "org/texts")
            assert refused.returncode == 2
            assert word in " ".join(refused.stderr.split())
            assert "Traceback" not in refused.stderr
            assert not (tmp_path / "no").exists()
