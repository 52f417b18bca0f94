"""Files of a model folder other than its tensors: their names, which of them are copied, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from llmq.errors import LlmqError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REPORT = "report.json"
CARD = "README.md"
RECIPE = "recipe.yaml"
GENERATION = "generation_config.json"
PARTIAL = ".partial"
QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where other tools say how a folder's weights are quantized, besides or instead of config.json."""
TEMPLATES = "additional_chat_templates"
"""The folder beside a tokenizer that holds its named chat templates, as transformers reads and writes it."""
MODULES = "modules.json"
"""Where sentence-transformers lists a model's parts, some of them folders in its own."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CARRIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".spm")
_CARRIED_NAMES = ("license", "licence", "notice", "copying", "use_policy")


def goes_along(name: str, *, code: bool) -> bool:
    """Whether a file is copied with the model: configuration, tokenizer, chat template, licence, and with `code` its
    Python files; never weights. name: without a folder."""
    if name.endswith(".index.json"):
        return False
    known = name.lower().endswith(_CARRIED) or name.lower().startswith(_CARRIED_NAMES)
    return known or (code and name.endswith(".py"))


def named_templates(folder: Path) -> dict[str, Path]:
    """The named chat templates of a model's or tokenizer's folder: name in that folder → file."""
    return {f"{TEMPLATES}/{path.name}": path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}


def modules_beside(folder: Path) -> dict[str, Path]:
    """The files of the folders that a modules.json names: name in the model's folder → file.

    sentence-transformers has pooling and dense layers there, which run after the model that is quantized. Pickles are
    left out.
    """
    try:
        listed = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        paths = [str(module.get("path", "")) for module in listed]
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    inside = [path for path in paths if path and Path(path).name == path]
    return {
        f"{path}/{file.name}": file
        for path in inside
        for file in sorted((folder / path).glob("*"))
        if goes_along(file.name, code=False) or file.suffix == ".safetensors"
    }


def write(path: Path, data: str | bytes) -> None:
    """Write a file atomically, replacing any file of that name. Raises LlmqError."""
    content = data.encode() if isinstance(data, str) else data
    try:
        put(path, [memoryview(content)], path.with_name(path.name + PARTIAL))
    except OSError as error:
        raise LlmqError(f"cannot write {path}: {error.strerror}; mend that and run the same command again") from error


def put(path: Path, pieces: Iterable[memoryview], partial: Path) -> str:
    """Write a file under the name `partial`, sync it, and rename it to `path`; returns its sha256.

    On any error `path` is unchanged and `partial` is deleted. Raises OSError, and what the iterator of pieces raises.
    """
    digest = hashlib.sha256()
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            for piece in pieces:
                write_all(fd, piece)
                digest.update(piece)
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_all(fd: int, data: memoryview) -> None:
    """Write all of the data, in as many system calls as needed. Raises OSError."""
    while data:
        data = data[os.write(fd, data) :]


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames are on disk; ignored on file systems that cannot."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}:
            raise
    finally:
        os.close(fd)
