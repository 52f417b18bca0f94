"""Perplexity by the standard protocol, printed with the number.

The text is tokenized once as a whole, with whatever the tokenizer adds by itself (a BOS once at the very beginning, or
nothing), cut into consecutive windows that do not overlap; what is left over at the end is dropped. Within a window
every token but the first is predicted from those before it. The value is exp of the mean negative log likelihood over
all predicted tokens, the logits taken to float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError, first_line
from llmq.pretrained import check_readable, load_model, load_tokenizer
from llmq.tokens import tokenize

WINDOW = 2048
_ROWS = 512  # logits taken to float32 at once: with a vocabulary of 128k, 256 MB rather than 1 GB


@dataclass(frozen=True)
class Perplexity:
    """value: exp(nll). nll: nats per predicted token. stderr: of the value, from the spread over windows; nan for one.

    tokens: predicted tokens; window: tokens in a window; seconds: of the measurement, load_seconds: of loading.
    """

    value: float
    nll: float
    stderr: float
    tokens: int
    windows: int
    window: int
    dtype: str
    protocol: str
    seconds: float
    load_seconds: float


def perplexity(folder: Path, text: str = "demo", **options: Any) -> Perplexity:
    """The perplexity of the model in `folder` on a text; options and errors as of `perplexities`."""
    return perplexities([folder], text, **options)[0]


def perplexities(
    folders: Sequence[Path],
    text: str = "demo",
    *,
    window: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    special_tokens: bool = True,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> list[Perplexity]:
    """The perplexities of the models in `folders` on the same windows of a text: 'demo' or a UTF-8 file.

    window: tokens in a window, None for 2048 or the smallest of the models' own maximums. max_windows: only the first.
    batch: windows per forward pass. special_tokens: let the tokenizer add what it adds by itself; without, it is the
    protocol of tools that tokenize bare text. progress: a bar with time left on stderr.
    Raises LlmqError if the text is missing, not text, or shorter than a window, a model does not load, or two of the
    models do not give the text the same tokens.
    """
    folders = [Path(folder) for folder in folders]
    read = [_tokens(folder, text, special_tokens, trust_remote_code, progress) for folder in folders]
    for folder, (ids, _) in zip(folders, read, strict=True):
        if not torch.equal(ids, read[0][0]):
            raise LlmqError(
                f"the tokenizers of {folders[0]} and {folder} give the text different tokens ({len(read[0][0])} and "
                f"{len(ids)}): their perplexities cannot be compared; is one the other's base model?"
            )
    window = window or min(default_window(folder, trust_remote_code) for folder in folders)
    return [
        _measure(folder, ids, name, window, max_windows, batch, dtype, device, trust_remote_code, progress)
        for folder, (ids, name) in zip(folders, read, strict=True)
    ]


def default_window(folder: Path, trust_remote_code: bool = False) -> int:
    """2048 tokens, or the longest input that the model's configuration allows, if that is less."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LlmqError(f"{folder}: its config.json cannot be used: {first_line(error)}") from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(WINDOW, longest) if isinstance(longest, int) and longest > 1 else WINDOW


def _tokens(
    folder: Path, text: str, special_tokens: bool, trust_remote_code: bool, progress: bool
) -> tuple[Tensor, str]:
    """The ids of the text, and what to call it."""
    check_readable(folder)
    content, name = _text(text)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = tokenize(content, tokenizer, special_tokens=special_tokens, progress=progress)
    if not special_tokens:
        return ids, f"{name}, no special tokens"
    bos = len(ids) and tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
    return ids, f"{name}, {'one BOS at its beginning' if bos else 'no BOS'}"


def _text(text: str) -> tuple[str, str]:
    if text == "demo":
        from llmq import demo

        return demo.evaluation_text(), "demo text"
    file = Path(text).expanduser()
    try:
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LlmqError(f"evaluation text {text}: no such file; give a text file or 'demo'") from error
    except UnicodeDecodeError as error:
        raise LlmqError(
            f"evaluation text {text} is not UTF-8 text (byte {error.start}): give a plain text file"
        ) from error
    except OSError as error:
        raise LlmqError(f"evaluation text {text} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise LlmqError(f"evaluation text {text} is empty: give a text of at least one window")
    return content, file.name


def _measure(
    folder: Path,
    ids: Tensor,
    name: str,
    window: int | None,
    max_windows: int | None,
    batch: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    progress: bool,
) -> Perplexity:
    length = window or default_window(folder, trust_remote_code)
    if length < 2:
        raise LlmqError(f"--window must be at least 2 tokens, not {length}")
    count = min(len(ids) // length, max_windows or len(ids))
    if not count:
        raise LlmqError(
            f"the evaluation text has {len(ids)} tokens, fewer than one window of {length}: "
            "lower --window or give a longer text"
        )
    begin = time.perf_counter()
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress)
    loaded = time.perf_counter()
    rows = model.get_input_embeddings().weight.shape[0]
    windows = ids[: count * length].view(count, length)
    if int(windows.max()) >= rows:
        raise LlmqError(
            f"{folder}: its tokenizer gives token {int(windows.max())}, the model knows {rows}: they differ"
        )
    losses = _losses(model, windows, batch, device, progress)
    nll = float(losses.mean())
    if not math.isfinite(nll):
        raise LlmqError(f"{folder}: its loss on the text is {nll}; the model overflows in {dtype}, try --dtype float32")
    value = math.exp(min(nll, 700.0))
    spread = float(losses.mean(1).std() / math.sqrt(count)) if count > 1 else math.nan
    shown = dtype if dtype != "auto" else str(model.dtype).removeprefix("torch.")
    return Perplexity(
        value=value,
        nll=nll,
        stderr=value * spread,
        tokens=count * (length - 1),
        windows=count,
        window=length,
        dtype=shown,
        protocol=f"{name}, tokenized whole, {count} × {length} tokens without overlap, every token after a window's "
        f"first predicted, {shown}, logits in float32",
        seconds=time.perf_counter() - loaded,
        load_seconds=loaded - begin,
    )


def _losses(model: Any, windows: Tensor, batch: int, device: str, progress: bool) -> Tensor:
    """Negative log likelihoods in nats, float64 [windows, length − 1]."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("perplexity"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    done: list[Tensor] = []
    with torch.inference_mode(), Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("perplexity", total=len(windows))
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            losses = [
                torch.nn.functional.cross_entropy(
                    logits[i : i + _ROWS].float(), targets[i : i + _ROWS], reduction="none"
                )
                for i in range(0, len(targets), _ROWS)
            ]
            done.append(torch.cat(losses).view(len(ids), -1).double().cpu())
            bar.advance(task, len(ids))
    return torch.cat(done)
