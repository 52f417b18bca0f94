"""Scores and proofs of earlier runs, in the user's cache: the same model, text, candidates and method find them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import files
from llmq.errors import LlmqError
from llmq.watch import Watch


@dataclass(frozen=True)
class Store:
    """One JSON file per result, in a folder named by the digest of all that the results depend on."""

    folder: Path

    @staticmethod
    def of(what: Mapping[str, Any]) -> Store:
        """The store for some plain data that the results depend on, in $XDG_CACHE_HOME/llmq/bits or ~/.cache."""
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Store(Path(root) / "llmq" / "bits" / digest[:32])

    def read(self, name: str) -> Any:
        """A result; None if there is none, or the file is damaged."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any, watch: Watch) -> None:
        """Keep a result; a cache that cannot be written is told, and no error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write(self.folder / f"{name}.json", json.dumps(value) + "\n")
        except (OSError, LlmqError) as error:
            watch.note(f"{self.folder}: scores cannot be kept there ({error}); a killed run scores again")

    def scratch(self, name: str) -> Path:
        """A folder for what a killed score goes on from."""
        return self.folder / name
