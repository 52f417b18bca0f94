"""Windows of token ids of a text, for perplexity and divergence.

The text is tokenized once as a whole, with the special tokens that the tokenizer adds (one BOS at the beginning, or
none), and cut into consecutive windows without overlap; the remainder at the end is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.data.tokens import tokenize
from llmq.discovery.calls import of_length
from llmq.errors import LlmqError, first_line
from llmq.inference.pretrained import check_readable, load_tokenizer

WINDOW = 2048


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The model's logits [windows, tokens, vocabulary] for token ids [windows, tokens].

    Raises LlmqError, with the number of tokens, if the model's code fails.
    """
    with of_length("the model", ids.shape[1], "--window"):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@dataclass(frozen=True)
class Named:
    """A named text: its data set on the hub, and how its rows are joined to one text.

    column: of the rows; rows: only the first ones, None for all; files: of the repository, None for all.
    """

    repository: str
    config: str | None
    split: str
    column: str
    join: str
    rows: int | None = None
    files: str | None = None
    revision: str | None = None


# As in the GPTQ and AWQ papers: WikiText-2 and PTB whole, of C4 the first 1,100 rows of its validation split.
TEXTS = {
    "wikitext2": Named("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "\n\n"),
    "c4": Named("allenai/c4", None, "validation", "text", " ", 1100, files="en/c4-validation.00000-of-00008.json.gz"),
    "ptb": Named("ptb-text-only/ptb_text_only", None, "test", "sentence", " ", revision="refs/convert/parquet"),
}


@dataclass(frozen=True)
class Text:
    """key: its name in the task ('demo', 'wikitext2', a file's name); name: its name in the protocol."""

    content: str
    key: str
    name: str


@dataclass(frozen=True)
class Windows:
    """ids: int64 [windows, tokens]; key: of the text; name: text and special tokens, for the protocol."""

    ids: Tensor
    key: str
    name: str

    @property
    def count(self) -> int:
        """The number of windows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.ids.shape[1]

    @cached_property
    def digest(self) -> str:
        """A hash of the ids, which distinguishes two texts of the same name."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    @property
    def protocol(self) -> str:
        """The part of a protocol that says which tokens are predicted."""
        return (
            f"{self.name}, tokenized whole, {self.count} × {self.length} tokens without overlap, "
            f"ids {self.digest[:8]}, every token after a window's first predicted"
        )

    def check(self, model: Any, folder: Path) -> None:
        """Raise LlmqError if the tokenizer gives ids that the model does not have."""
        rows = model.get_input_embeddings().weight.shape[0]
        if int(self.ids.max()) >= rows:
            raise LlmqError(
                f"{folder}: its tokenizer gives token {int(self.ids.max())}, but the model has only {rows} embeddings"
            )


def cut(
    folders: Sequence[Path],
    text: str = "demo",
    *,
    window: int | None = None,
    max_windows: int | None = None,
    special_tokens: bool = True,
    data_dir: Path | None = None,
    kernels: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Windows:
    """The windows of a text, the same for all models in `folders`; options as in `perplexities`.

    Raises LlmqError if the text is missing, not text, or shorter than a window, if the window is longer than a model's
    maximum, or if two models tokenize the text differently.
    """
    for folder in folders:
        check_readable(folder, kernels)
    read = read_text(text, data_dir)
    found: list[tuple[Tensor, str]] = []
    for folder in folders:
        found.append(_tokens(folder, read, special_tokens, trust_remote_code, progress))
        if not torch.equal(found[-1][0], found[0][0]):
            raise LlmqError(
                f"the tokenizers of {folders[0]} and {folder} give the text different tokens ({len(found[0][0])} and "
                f"{len(found[-1][0])}): they cannot be compared; check that one is quantized from the other"
            )
    longest = {folder: most for folder in folders if (most := _longest(folder, trust_remote_code))}
    length = window or min([WINDOW, *longest.values()])
    if length < 2:
        raise LlmqError(f"--window must be at least 2 tokens, not {length}")
    if longest and length > min(longest.values()):
        folder, most = min(longest.items(), key=lambda pair: pair[1])
        raise LlmqError(
            f"--window {length} is longer than the longest input of {folder}, {most} tokens (its "
            f"max_position_embeddings): give {most} or less"
        )
    ids, name = found[0]
    count = min(len(ids) // length, max_windows or len(ids))
    if not count:
        raise LlmqError(
            f"the evaluation text has {len(ids)} tokens, fewer than one window of {length}: "
            "lower --window or give a longer text"
        )
    return Windows(ids[: count * length].view(count, length), read.key, name)


def default_window(folder: Path, trust_remote_code: bool = False) -> int:
    """2048 tokens, or the longest input that the model's configuration allows, if that is less."""
    return min(WINDOW, _longest(folder, trust_remote_code) or WINDOW)


def _longest(folder: Path, trust_remote_code: bool) -> int | None:
    """The longest input that the model's configuration allows; None if it states none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LlmqError(
            f"{folder}: its config.json cannot be used ({first_line(error)}): give the folder of a causal model"
        ) from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 1 else None


def _tokens(
    folder: Path, text: Text, special_tokens: bool, trust_remote_code: bool, progress: bool
) -> tuple[Tensor, str]:
    """The ids of the text, and its name for the protocol."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = tokenize(text.content, tokenizer, special_tokens=special_tokens, progress=progress)
    if not special_tokens:
        return ids, f"{text.name}, no special tokens"
    bos = len(ids) and tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
    return ids, f"{text.name}, {'one BOS at its beginning' if bos else 'no BOS'}"


def read_text(text: str, data_dir: Path | None = None) -> Text:
    """'demo', a text of `TEXTS` (from `data_dir` if it holds it, else from the hub), or a UTF-8 file.

    Raises LlmqError if it is not available or is empty.
    """
    if text == "demo":
        from llmq import demo

        return Text(demo.evaluation_text(), "demo", "demo text")
    if text in TEXTS and not Path(text).is_file():
        content, name = _named(text, TEXTS[text], data_dir)
        return Text(content, text, name)
    if not text:
        raise LlmqError("--text is empty: give 'demo', wikitext2, c4, ptb or a text file")
    file = Path(text).expanduser()
    return Text(_file(file, text), file.name, file.name)


def _file(file: Path, text: str) -> str:
    try:
        content = file.read_text(encoding="utf-8-sig")  # a byte order mark is no token
    except FileNotFoundError as error:
        names = ", ".join(map(repr, ("demo", *TEXTS)))
        raise LlmqError(f"evaluation text {text}: no such file; give a text file or one of {names}") from error
    except UnicodeDecodeError as error:
        raise LlmqError(
            f"evaluation text {text} is not UTF-8 text (byte {error.start}): give a plain text file"
        ) from error
    except OSError as error:
        raise LlmqError(f"evaluation text {text} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise LlmqError(f"evaluation text {text} is empty: give a text of at least one window")
    return content


def _named(key: str, named: Named, data_dir: Path | None) -> tuple[str, str]:
    """The text, and its name with its source."""
    joined = {"\n\n": "a blank line", " ": "spaces"}[named.join]
    what = f"{key} {named.split} split, {f'first {named.rows} ' if named.rows else ''}rows joined by {joined}"
    if data_dir is None:
        return named.join.join(_column(_hub_rows(key, named), named)), what
    places = [data_dir / key, data_dir / f"{key}_{named.split}", data_dir / key / named.split]
    for place in places:
        text, rows = place.with_name(place.name + ".txt"), place.with_name(place.name + ".jsonl")
        if text.is_file():
            return _file(text, str(text)), f"{key} from {text.name}"
        if rows.is_file():
            from llmq.data.rows import jsonl_rows

            def local(file: Path = rows) -> Iterator[tuple[str, Any]]:
                for row in jsonl_rows(file, "evaluation text"):
                    yield row.where, row.fields

            return named.join.join(_column(local, named)), what
    raise LlmqError(f"evaluation text {key}: {data_dir} has neither {places[0].name}.txt nor {places[0].name}.jsonl")


def _column(rows: Callable[[], Iterator[tuple[str, Any]]], named: Named) -> list[str]:
    texts: list[str] = []
    for where, fields in rows():
        value = fields.get(named.column)
        if not isinstance(value, str):
            raise LlmqError(f"{where} has no text in column {named.column!r}; its columns are {', '.join(fields)}")
        texts.append(value)
        if named.rows and len(texts) == named.rows:
            break
    return texts


def _hub_rows(key: str, named: Named) -> Callable[[], Iterator[tuple[str, Any]]]:
    def rows() -> Iterator[tuple[str, Any]]:
        from datasets import load_dataset

        from llmq.checkpoint import hub

        files = {"data_files": {named.split: named.files}} if named.files else {}
        try:
            found = load_dataset(
                named.repository, named.config, split=named.split, revision=named.revision, streaming=True, **files
            )
            for number, fields in enumerate(found):
                yield f"{named.repository} row {number}", fields
        except Exception as error:
            raise _unreachable(key, hub.explain, error, named.repository) from error

    return rows


def _unreachable(key: str, explain: Callable[..., LlmqError], error: Exception, repository: str) -> LlmqError:
    try:
        told = str(explain(error, repository, "dataset"))
    except Exception as other:
        told = f"{repository}: {first_line(other)}"
    return LlmqError(f"evaluation text {key}: {told}; or give a folder that holds {key}.txt or .jsonl as --data-dir")
