"""Upload a finished folder to a repository on the hub, after checking that it is complete.

huggingface_hub does the work: one commit, so that nobody sees half a model; files that an interrupted upload has
already sent are not sent again.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmq.checkpoint.claim import STATE
from llmq.checkpoint.files import CARD, REPORT
from llmq.checkpoint.journal import check_finished
from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError, first_line
from llmq.report.card import write_place
from llmq.report.report import Report

# The files that are uploaded; any others in the folder (notes, logs, a token) stay private.
_MODEL = (
    "*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*.py", "merges.txt", "vocab.txt",
    "README.md", "report.html", "LICENSE*", "NOTICE*", "*POLICY*",
)  # fmt: skip
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def push(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload the model's files of a finished folder as one commit; returns the commit's URL.

    The repository and the branch are created if missing.

    The example in the folder's model card then loads from the repository.
    Raises LlmqError if the folder is unfinished or damaged, nobody is logged in, the token has no write access, or the
    hub cannot be reached; nothing is then changed on the hub, except that an empty repository may have been created.
    """
    from huggingface_hub import HfApi, get_token

    if not _REPOSITORY.fullmatch(repo_id):
        raise LlmqError(f"{repo_id!r} is no repository: write it as NAME/MODEL, letters, digits, '.', '_' and '-' only")
    check(folder)
    if get_token() is None:
        raise LlmqError("nobody is logged in to the hub here: run 'hf auth login', or set HF_TOKEN to a write token")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise LlmqError(
                f"{repo_id} exists already and is public: make it private in its settings, or leave out --private"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if (folder / CARD).is_file():
            write_place(folder, repo_id)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Upload by llmq",
            allow_patterns=list(_MODEL),
            ignore_patterns=[f"{STATE}/*", ".*", "*/.*", "*.partial"],
        )
    except Exception as error:
        raise _explained(error, repo_id) from error
    return str(done.commit_url)


def check(folder: Path) -> None:
    """Raise LlmqError unless the folder is a complete model that llmq finished.

    Reads the headers of all shards, and every byte of them if the run's journal still exists.
    """
    finished = check_finished(folder)
    source = FolderSource(folder, trust_remote_code=True, quantized_ok=True)
    if not Report.there(folder):
        if not finished:
            raise LlmqError(f"{folder} has no {REPORT}: it is not a folder that llmq finished")
        return
    report = Report.load(folder)
    if report.bytes != source.total_bytes:
        raise LlmqError(
            f"{folder}: its weights come to {source.total_bytes:,} bytes and {REPORT} says {report.bytes:,}: "
            "they are of different runs, write the folder again"
        )


def _explained(error: Exception, repo_id: str) -> LlmqError:
    """An exception of the hub or its client as one line with the remedy; any other is raised unchanged."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, LlmqError):
        return error
    where = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return LlmqError(
            f"this login may not write to {repo_id} ({where} says {status}): 'hf auth whoami' shows whose it is; log "
            "in with a token that has write access to it"
        )
    if status is not None:
        return LlmqError(f"the hub ({where}) refused {repo_id}: {first_line(error)}; the same command resumes")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return LlmqError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to upload")
    if isinstance(error, errors.HFValidationError):
        return LlmqError(f"{repo_id!r} is no repository: {first_line(error)}")
    if isinstance(error, httpx.TransportError | ConnectionError | TimeoutError):
        return LlmqError(
            f"{repo_id}: the hub ({where}) cannot be reached ({type(error).__name__}); check the network: the same "
            "command resumes, and finished files are not sent again"
        )
    raise error
