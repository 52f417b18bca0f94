"""The embedded demo model, and the text for its training, calibration and evaluation.

The text is part of every CPython: the language reference inside ``pydoc_data`` and the sources of the standard library,
read from the running interpreter. So ``llmq quantize demo`` needs neither a download nor a licence question. The text
differs a little between Python versions, and so does the last digit of a perplexity.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from pathlib import Path

EVALUATION_MODULES: tuple[str, ...] = (
    "argparse",
    "difflib",
    "statistics",
    "configparser",
    "fractions",
    "heapq",
    "textwrap",
    "json.decoder",
)
"""Held out by name: never in the training or the calibration text."""

CALIBRATION_CHARACTERS = 1_500_000

# Tests, data tables, and modules that a distribution may not install.
_EXCLUDED_FOLDERS = frozenset(
    (
        *("__pycache__", "dist-packages", "site-packages", "lib-dynload"),
        *("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "ensurepip", "msilib"),
        *("__phello__", "encodings", "pydoc_data"),
    )
)
_EXCLUDED_MODULES = frozenset(("html.entities", "keyword", "symbol", "token", "turtle"))


def path() -> Path:
    """The folder of the demo model: config, tokenizer and bf16 safetensors, as ``from_pretrained`` expects them."""
    return Path(__file__).resolve().parent


def documents() -> list[tuple[str, str]]:
    """Training-side (name, text) pairs: pages of the language reference and modules, held-out modules left out.

    The order is a fixed shuffle (by a hash of the name), so that any prefix mixes prose and code.
    """
    found = _topics() + [(name, text) for name, text in _modules() if name not in EVALUATION_MODULES]
    return sorted(found, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def calibration_text() -> str:
    """About 1.5 million characters of training-side text, the documents joined by a blank line."""
    kept: list[str] = []
    room = CALIBRATION_CHARACTERS
    for _, text in documents():
        if room <= 0:
            break
        kept.append(text)
        room -= len(text)
    return "\n\n".join(kept)


def evaluation_text() -> str:
    """The held-out modules' sources, in the order of ``EVALUATION_MODULES``, joined by a blank line.

    Raises FileNotFoundError if the interpreter carries none of them as source.
    """
    root = _library()
    texts = [_read(root.joinpath(*name.split(".")).with_suffix(".py")) for name in EVALUATION_MODULES]
    if not any(texts):
        raise FileNotFoundError(f"no held-out module's source under {root}: this Python carries no library sources")
    return "\n\n".join(text for text in texts if text)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read(file: Path) -> str:
    """The file's text; empty if it is missing or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _topics() -> list[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [(f"topic:{name}", text) for name, text in topics.items()]


def _modules() -> list[tuple[str, str]]:
    root = _library()
    found: list[tuple[str, str]] = []
    for folder, below, files in os.walk(root):
        below[:] = [d for d in below if d not in _EXCLUDED_FOLDERS and "-" not in d]  # site-packages may be huge
        package = Path(folder).relative_to(root).parts
        for file in files:
            stem = file.removesuffix(".py")
            name = ".".join((*package, stem)).removesuffix(".__init__")
            if stem == file or name in _EXCLUDED_MODULES or name.startswith("_sysconfigdata"):
                continue
            if text := _read(Path(folder, file)):
                found.append((name, text))
    return found
