"""Perplexity by the standard protocol, which is reported with the number.

Within a window (`windows.py`) every token but the first is predicted from those before it. The value is exp of the mean
negative log likelihood over all predicted tokens, with logits converted to float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.inference.pretrained import input_device, load_model
from llmq_eval import windows as cutting
from llmq_eval.journal import Journal
from llmq_eval.processes import mine
from llmq_eval.windows import WINDOW, Windows, default_window, logits_of

__all__ = ["WINDOW", "Perplexity", "default_window", "measure", "perplexities", "perplexity", "progress_bar"]

_ROWS = (
    512  # positions whose logits are converted to float32 at once: with a vocabulary of 128k, 256 MB rather than 1 GB
)


@dataclass(frozen=True)
class Perplexity:
    """value: exp(nll). nll: nats per predicted token. stderr: of the value, from the variance over windows; nan for a
    single window.

    tokens: predicted tokens; window: tokens in a window; seconds: of the measurement, load_seconds: of loading.
    by_window: nats per token of each window.
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
    by_window: list[float] = field(repr=False, default_factory=list)


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
    data_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> list[Perplexity]:
    """The perplexities of the models in `folders` on the same windows of a text: 'demo', 'wikitext2' … or a UTF-8 file.

    window: tokens in a window, None for 2048 or the smallest of the models' own maximums. max_windows: use only the
    first ones. batch: windows per forward pass. special_tokens: let the tokenizer add its special tokens; False is the
    protocol of tools that tokenize the text only. data_dir: local copies of the named texts. progress: show a bar with
    the remaining time on stderr.
    Raises LlmqError if the text is missing, not text, or shorter than a window, a model does not load, or two models
    tokenize the text differently.
    """
    folders = [Path(folder) for folder in folders]
    windows = cutting.cut(
        folders,
        text,
        window=window,
        max_windows=max_windows,
        special_tokens=special_tokens,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    found = []
    for folder in folders:
        begin = time.perf_counter()
        model = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress)
        seconds = time.perf_counter() - begin
        found.append(
            measure(
                model,
                folder,
                windows,
                batch=batch,
                device=input_device(device),
                progress=progress,
                load_seconds=seconds,
            )
        )
        del model
    return found


def measure(
    model: Any,
    folder: Path,
    windows: Windows,
    *,
    batch: int = 1,
    device: str = "cpu",
    progress: bool = True,
    load_seconds: float = 0.0,
    journal: Journal | None = None,
    kernels: bool = False,
) -> Perplexity:
    """The perplexity of a loaded model; windows in the journal are not measured again.

    kernels: whether it was loaded on llmq's operators, for the protocol.

    Raises LlmqError if the tokenizer gives ids that the model does not have, or the loss is not finite.
    """
    begin = time.perf_counter()
    windows.check(model, folder)
    shown = shown_dtype(model, kernels)
    journal = journal or Journal(None)
    with torch.inference_mode():
        for span in batches(windows.count, batch, journal, progress, "perplexity"):
            means = _losses(model, windows.ids[span.start : span.stop].to(device))
            if not bool(means.isfinite().all()):
                # Not written to the journal, whose entries are never measured again.
                ways = "its weights may be damaged" if model.dtype == torch.float32 else "try --dtype float32"
                raise LlmqError(
                    f"{folder}: its loss on the text is {float(means.mean())}; the model overflows in {shown}: {ways}"
                )
            journal.add({str(i): float(one) for i, one in zip(span, means, strict=True)})
    journal.share()
    by_window = torch.tensor([journal.done[str(i)] for i in range(windows.count)], dtype=torch.float64)
    nll = float(by_window.mean())
    value = math.exp(min(nll, 700.0))
    spread = float(by_window.std() / math.sqrt(windows.count)) if windows.count > 1 else math.nan
    return Perplexity(
        value=value,
        nll=nll,
        stderr=value * spread,
        tokens=windows.count * (windows.length - 1),
        windows=windows.count,
        window=windows.length,
        dtype=shown,
        protocol=f"{windows.protocol}, {shown}, logits in float32",
        seconds=time.perf_counter() - begin,
        load_seconds=load_seconds,
        by_window=by_window.tolist(),
    )


def shown_dtype(model: Any, kernels: bool = False) -> str:
    """A model's dtype, and whether its quantized weights run on llmq's operators."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{dtype} on llmq's kernels" if kernels else dtype


def batches(count: int, batch: int, journal: Journal, progress: bool, what: str) -> Iterator[range]:
    """This rank's batches of windows that are not in the journal, with a progress bar that counts the others as done.

    Batches always begin at multiples of `batch`, so that a resumed run computes the same as an uninterrupted one.
    """
    left = spans_left(count, batch, journal)
    own = sum(map(len, mine(left)))
    with progress_bar(what, progress) as bar:
        done = count - sum(map(len, left))
        task = bar.add_task(what, total=done + own, completed=done)
        for span in mine(left):
            yield span
            bar.advance(task, len(span))


def spans_left(count: int, batch: int, journal: Journal) -> list[range]:
    """The batches of windows that are not in the journal, of all ranks."""
    spans = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [span for span in spans if any(str(i) not in journal.done for i in span)]


def progress_bar(what: str, shown: bool) -> Any:
    """A progress bar on stderr with the remaining time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def _losses(model: Any, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of each window of a batch in nats, float64 [windows]."""
    logits = logits_of(model, ids)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    losses = [
        torch.nn.functional.cross_entropy(logits[i : i + _ROWS].float(), targets[i : i + _ROWS], reduction="none")
        for i in range(0, len(targets), _ROWS)
    ]
    return torch.cat(losses).view(len(ids), -1).double().cpu().mean(1)
