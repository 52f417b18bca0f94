"""Resolve what the user typed ('demo', a folder, a hub id) to a folder on disk; every failure is one clear line.

huggingface_hub does the work: its cache, its parallel and resumed downloads, its tokens. Added here: the list of files
is read first, so that an unusable repository is refused before any download, and only the safetensors files that the
index names are fetched.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.checkpoint import strangers
from llmq.checkpoint.files import CARD, INDEX, MODULES, PICKLES, SINGLE, goes_along
from llmq.errors import LlmqError, first_line
from llmq.machine import existing

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""
ATTEMPTS = 4
"""Attempts of a download; the waits between them are 1, 2 and 4 seconds. Finished files are not fetched again."""

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def resolve(
    model: str, *, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> Path:
    """The folder of a model: 'demo', an existing folder, or a hub id, whose files are fetched into the hub's cache.

    trust_remote_code: fetch the repository's Python files as well. Without a network, a repository in the cache is
    used.
    Raises LlmqError if the path does not exist, the repository is missing, gated or has no safetensors weights, the
    hub cannot be reached, or the disk is too small for it.
    """
    if model == "demo":
        from llmq import demo

        return demo.path()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        told = strangers.of_file(path)
        raise LlmqError(
            f"{model} is a file, not a model folder{f' ({told})' if told else ''}: give the folder of a model"
        )
    if is_path(model):
        raise LlmqError(f"{model}: no such folder")
    return _fetch(model, revision, token, trust_remote_code)


def is_path(name: str) -> bool:
    """Whether this can only mean a path: a hub id is 'name' or 'org/name', without spaces or a leading dot."""
    return name.startswith((".", "~")) or not _REPOSITORY.fullmatch(name) or ".." in name


def repository(
    name: str, kind: str, *, revision: str | None = None, token: str | None = None
) -> ModelInfo | DatasetInfo:
    """A repository's commit, and its files with their sizes, from the hub. kind: 'model' or 'dataset'.

    Raises LlmqError as `explain` words it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    ask: Callable[..., Any] = api.model_info if kind == "model" else api.dataset_info
    try:
        info: ModelInfo | DatasetInfo = ask(name, revision=revision, timeout=TIMEOUT, files_metadata=True)
    except Exception as error:
        raise explain(error, name, kind) from error
    return info


class Unreachable(LlmqError):
    """The hub does not answer; the cache may still hold the files."""


def explain(error: Exception, name: str, kind: str) -> LlmqError:
    """An exception of huggingface_hub, datasets or their HTTP client, as one line with the way out.

    An exception that has nothing to do with the hub is raised again as it is.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    where = constants.ENDPOINT
    what = "model" if kind == "model" else "data set"
    path = name if kind == "model" else f"datasets/{name}"
    chain = _chain(error)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(errors.GatedRepoError) or "gated dataset" in str(error):
        return LlmqError(
            f"{name} is gated: accept its terms at {where}/{path}, then log in with 'hf auth login' or set HF_TOKEN"
        )
    if has(errors.RevisionNotFoundError):
        return LlmqError(f"{name} has no such revision on the hub: see {where}/{path}/commits")
    if has(errors.RepositoryNotFoundError, errors.HFValidationError):
        return LlmqError(
            f"{name}: no such {'folder' if kind == 'model' else 'file'} here, and no such {what} on the hub ({where}); "
            "check the spelling, and log in with 'hf auth login' if it is private"
        )
    if has(errors.OfflineModeIsEnabled):
        return Unreachable(
            f"{name}: no such {'folder' if kind == 'model' else 'file'} here, and HF_HUB_OFFLINE is set; "
            "unset it, or give a local path"
        )
    if has(httpx.HTTPStatusError, errors.HfHubHTTPError) and not has(httpx.TransportError):
        return Unreachable(f"the hub ({where}) refused {name}: {first_line(error)}; try again later")
    if has(httpx.TransportError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError):
        return Unreachable(
            f"{name}: no such {'folder' if kind == 'model' else 'file'} here, and the hub ({where}) cannot be reached "
            f"({type(chain[-1]).__name__}); check the network, or give a local path"
        )
    raise error


def _chain(error: BaseException | None) -> list[BaseException]:
    """The exception, its cause, the cause's cause …"""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _fetch(name: str, revision: str | None, token: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        info = repository(name, "model", revision=revision, token=token)
    except Unreachable as unreachable:
        try:
            return Path(
                snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[SINGLE, INDEX])
            )
        except Exception:
            raise unreachable from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = _shards(name, info.sha, sizes, token)
    return _snapshot(name, info.sha, revision, token, sizes, [*weights, *_others(sizes, trust_remote_code)])


def without_weights(name: str, info: ModelInfo, token: str | None, trust_remote_code: bool) -> tuple[Path, list[str]]:
    """A folder with all files that `resolve` fetches but the weights, and the names of those. Raises as resolve."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = _shards(name, info.sha, sizes, token)
    others = _others(sizes, trust_remote_code)
    wanted = [*(file for file in weights if file == INDEX), *others]
    return _snapshot(name, info.sha, info.sha, token, sizes, wanted), [file for file in weights if file != INDEX]


def _snapshot(
    name: str, commit: str | None, revision: str | None, token: str | None, sizes: dict[str, int], wanted: list[str]
) -> Path:
    """The cache's folder of a repository, with the wanted files in it."""
    from huggingface_hub import snapshot_download

    _check_disk(name, commit, {file: sizes[file] for file in wanted})
    # The pattern language has no escape but brackets; names with brackets do not occur among these files.
    return Path(
        _retried(
            lambda: snapshot_download(name, revision=revision or "main", token=token, allow_patterns=wanted),
            name,
        )
    )


def _shards(name: str, commit: str | None, sizes: dict[str, int], token: str | None) -> list[str]:
    """The weight files to fetch, with their index."""
    from huggingface_hub import hf_hub_download

    weights = _weights(name, sizes)
    if weights is None:
        index = _retried(lambda: hf_hub_download(name, INDEX, revision=commit, token=token), name)
        weights = _indexed(name, Path(index), sizes)
    return weights


def _others(sizes: dict[str, int], trust_remote_code: bool) -> list[str]:
    """The files to fetch that are no weights of the model."""
    return [file for file in sizes if _carried(file, trust_remote_code) or _beside(file, sizes)]


def _weights(name: str, files: dict[str, int]) -> list[str] | None:
    """The weight files to fetch; None if the index must be read first. Raises LlmqError if none is usable."""
    if "config.json" not in files:
        unknown = "has no config.json on the hub: it is not a transformers model"
        raise LlmqError(f"{name} {strangers.of_names(files) or unknown}")
    if INDEX in files:
        return None
    if SINGLE in files:
        return [SINGLE]
    found = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if found:
        raise LlmqError(
            f"{name} has neither {SINGLE} nor {INDEX} on the hub, only {', '.join(sorted(found)[:3])}: "
            "it is an adapter, a variant or a part of a model; give the model that it belongs to"
        )
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    if pickles:
        raise LlmqError(
            f"{name} has only pickled weights ({', '.join(pickles[:3])}), which can run code when read, so llmq does "
            "not: convert it to safetensors on a machine that may run it, or use a revision that has them"
        )
    if told := strangers.of_names(files):
        raise LlmqError(f"{name} {told}")
    raise LlmqError(f"{name} has no safetensors weights on the hub (it has {', '.join(sorted(files)[:5])})")


def _indexed(name: str, index: Path, files: dict[str, int]) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LlmqError(f"{name}: {INDEX} on the hub is damaged ({error}); tell its owner") from error
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise LlmqError(f"{name}: {INDEX} names {missing[0]}, which the repository does not hold; try another revision")
    return [INDEX, *shards]


def _beside(file: str, files: Container[str]) -> bool:
    """Whether a file is of a part that a modules.json may name (`files.modules_beside`)."""
    folder, _, name = file.partition("/")
    return MODULES in files and bool(folder) and name in ("config.json", SINGLE)


def _carried(file: str, trust_remote_code: bool) -> bool:
    """Whether a file other than weights is fetched: configuration, tokenizer, licence, and the model's own code."""
    # The card is fetched for its metadata: licence and languages are copied into the quantized model's card.
    if file.endswith(".jinja") or file == CARD:
        return True
    if file.endswith(".py"):
        return trust_remote_code
    return "/" not in file and goes_along(file, code=False)


def _check_disk(name: str, commit: str | None, sizes: dict[str, int]) -> None:
    """Raise LlmqError if the files that are not in the cache yet do not fit on its disk."""
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    needed = sum(
        size for file, size in sizes.items() if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)
    )
    free = shutil.disk_usage(existing(cache)).free
    if needed > free:
        raise LlmqError(
            f"{name} needs {needed / 2**30:.1f} GiB in {cache} and {free / 2**30:.1f} GiB are free: "
            "make room, or set HF_HOME to a folder on a larger disk"
        )


def _retried(download: Callable[[], str], name: str) -> str:
    """Run a download, and run it again after connection errors that huggingface_hub does not retry itself."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    for attempt in range(ATTEMPTS):
        try:
            return download()
        except Exception as error:
            dropped = isinstance(error, httpx.TransportError | ConnectionError) or "Consistency check" in str(error)
            if isinstance(error, OSError) and error.errno == 28:
                raise LlmqError(f"{name}: the hub cache's disk is full: make room, run the same command") from error
            if not dropped:
                raise explain(error, name, "model") from error
            if attempt == ATTEMPTS - 1:
                raise LlmqError(
                    f"{name}: the connection to the hub broke {ATTEMPTS} times ({type(error).__name__}); finished "
                    "files are kept, run the same command again"
                ) from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable")
