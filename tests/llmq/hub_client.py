"""A process of its own that talks to a hub: HF_ENDPOINT counts only where it is set before huggingface_hub is imported.

Run as a script it answers JSON lines: {"do": "resolve", "remote", "push" or "windows", …} → {"value": …}
or {"error": …, "text": …}.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


class HubClient:
    """`with HubClient(endpoint, cache) as client: client.ask(do="resolve", model="org/name")`."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "eval"))
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": path,
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)

    def ask(self, **question: Any) -> dict[str, Any]:
        """One question, one answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def _read_remotely(do: str, model: str, piece: int, rows: list[int] | None = None) -> dict[str, Any]:
    """The sha256 of every tensor of a model that is read over the network, or of some of its rows."""
    from llmq.checkpoint import remote
    from llmq.checkpoint.source import FolderSource

    remote.PIECE = piece
    remote.time.sleep = lambda seconds: None  # type: ignore[attr-defined,assignment]
    folder, store = remote.open_remote(model)
    source = FolderSource(folder, store=store)
    read = source.read if rows is None else lambda name: source.read_rows(name, *rows)
    hashes = {name: hashlib.sha256(bytes(read(name).flatten().tolist())).hexdigest() for name in source.names()}
    return {"hashes": hashes, "fingerprint": source.fingerprint(), "warnings": source.warnings, "folder": str(folder)}


def _answer(question: dict[str, Any]) -> Any:
    if question["do"] == "resolve":
        from llmq.checkpoint.hub import resolve

        return str(resolve(question["model"], trust_remote_code=question.get("trust_remote_code", False)))
    if question["do"] == "remote":
        return _read_remotely(**question)
    if question["do"] == "push":
        from llmq.push import push

        os.environ["HF_TOKEN"] = question.get("token", "")
        return push(Path(question["folder"]), question["repo"], **question.get("options", {}))
    import datasets.config
    from transformers import AutoTokenizer

    from llmq.data.calibration import windows
    from llmq.recipe.recipe import Calibration

    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.1
    tokenizer = AutoTokenizer.from_pretrained(question["tokenizer"])
    found = windows(Calibration(**question["calibration"]), tokenizer, seed=0)
    return {"ids": found.ids.tolist(), "notes": found.notes, "description": found.description}


if __name__ == "__main__":
    out = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            reply = {"value": _answer(json.loads(line))}
        except Exception as error:
            reply = {"error": type(error).__name__, "text": str(error)}
        out.write(json.dumps(reply) + "\n")
        out.flush()
