"""Divergence of a model from its base, which shows damage long before task accuracy changes.

For every predicted position of the windows: KL(base ‖ model) in nats, whether both have the same most likely token, and
whether the text's own token is the most likely one of the base and of the model (a flip if only of one). The logits of
both are converted to float64. Only one batch of logits of each model is in memory; if the two models do not fit in
memory together, the base's log-probabilities are stored on disk.
"""

from __future__ import annotations

import base64
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq import ranks
from llmq.errors import LlmqError
from llmq_eval import intervals
from llmq_eval.journal import Journal
from llmq_eval.perplexity import batches, progress_bar, spans_left
from llmq_eval.processes import mine
from llmq_eval.windows import Windows, logits_of

QUANTILES = (0.5, 0.9, 0.99, 1.0)
_ROWS = 64  # positions converted to float64 at once: with a vocabulary of 128k, 64 MB for each of a few tensors

LogProbs = Callable[[range], Tensor]
"""A batch of windows → the base's log-probabilities, [windows × (tokens − 1), vocabulary], on the model's device."""


@dataclass(frozen=True)
class Divergence:
    """Per window, in order: mean KL in nats, and the fractions of positions with the same top token, with a top token
    that is right in the base and wrong in the model (lost), and the opposite (gained). quantiles: of the KL over all
    positions, at QUANTILES; bounds: their 95 % intervals, from resampled windows; None for the maximum.
    """

    kl: list[float]
    top1: list[float]
    lost: list[float]
    gained: list[float]
    quantiles: tuple[float, ...]
    bounds: tuple[tuple[float | None, float | None], ...]
    protocol: str


def measure(
    base: LogProbs,
    model: Any,
    folder: Path,
    windows: Windows,
    *,
    batch: int = 1,
    base_name: str = "base",
    shown: str = "both in float32",
    device: str = "cpu",
    progress: bool = True,
    journal: Journal | None = None,
) -> Divergence:
    """The divergence of a loaded model from its base on the windows; windows in the journal are not measured again.

    base_name, shown: the base's name and the models' dtypes, for the protocol.
    Raises LlmqError if the two have different vocabularies, or the logits of either are not finite.
    """
    windows.check(model, folder)
    journal = journal or Journal(None)
    with torch.inference_mode():
        for span in batches(windows.count, batch, journal, progress, "divergence"):
            ids = windows.ids[span.start : span.stop].to(device)
            reference = base(span)
            logits = logits_of(model, ids)[:, :-1].flatten(0, 1)
            if logits.shape[-1] != reference.shape[-1]:
                raise LlmqError(
                    f"{folder} has {logits.shape[-1]} tokens in its vocabulary and its base {reference.shape[-1]}: "
                    "they cannot be compared"
                )
            rows = _rows(reference, logits, ids[:, 1:].flatten()).view(4, len(ids), -1).cpu()
            if not bool(torch.isfinite(rows[0]).all()):
                raise LlmqError(f"{folder}: its divergence from the base is not finite; try --dtype float32")
            journal.add({str(index): _piece(rows[:, place]) for place, index in enumerate(span)})
    journal.share()
    pieces = [journal.done[str(index)] for index in range(windows.count)]
    every = np.stack([np.frombuffer(base64.b64decode(piece[4]), dtype=np.float32) for piece in pieces])
    return Divergence(
        kl=[piece[0] for piece in pieces],
        top1=[piece[1] for piece in pieces],
        lost=[piece[2] for piece in pieces],
        gained=[piece[3] for piece in pieces],
        quantiles=tuple(float(value) for value in np.quantile(every, QUANTILES)),
        bounds=tuple(intervals.quantile(every, q) if q < 1 else (None, None) for q in QUANTILES),
        protocol=f"{windows.protocol}, KL({base_name} ‖ model) in nats per position, {shown}, logits in float64",
    )


def _piece(rows: Tensor) -> list[Any]:
    """A window's journal entry: four means, and every position's KL for the quantiles."""
    each = base64.b64encode(rows[0].to(torch.float32).numpy().tobytes()).decode()
    return [*(float(row.mean()) for row in rows), each]


def _rows(base: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """KL, same top token, lost and gained of each position: float64 [4, positions]."""
    found = []
    for start in range(0, len(targets), _ROWS):
        part = slice(start, start + _ROWS)
        p, q, target = base[part].double(), logits[part].double().log_softmax(-1), targets[part]
        first, second = p.argmax(-1), q.argmax(-1)
        was, now = first == target, second == target
        terms = p.exp() * (p - q)
        # A token of probability 0 in the base adds nothing, whatever its probability in the model.
        kl = torch.where(p == -torch.inf, 0.0, terms).sum(-1).clamp_min(0.0)
        found.append(torch.stack([kl, *((first == second).double(), (was & ~now).double(), (~was & now).double())]))
    return torch.cat(found, 1)


def loaded(model: Any, windows: Windows, device: str) -> LogProbs:
    """The base's log-probabilities, computed for every batch by the base in memory."""

    def log_probs(span: range) -> Tensor:
        ids = windows.ids[span.start : span.stop].to(device)
        logits = logits_of(model, ids)[:, :-1].flatten(0, 1)
        return log_softmax(logits)

    return log_probs


@contextmanager
def stored(
    load: Callable[[], Any],
    windows: Windows,
    *,
    batch: int,
    device: str,
    folder: Path,
    progress: bool,
    journal: Journal | None = None,
) -> Iterator[LogProbs]:
    """The base's log-probabilities in a temporary file in `folder`, float64, if both models do not fit in memory.

    Only of this rank's windows that are not in the journal.
    Raises LlmqError if the disk is too small for it.
    """
    model = load()
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    with tempfile.TemporaryDirectory(dir=folder, prefix="base-") as place:
        spans = mine(spans_left(windows.count, batch, journal or Journal(None)))
        count = sum(map(len, spans))
        _check_disk(8 * count * ranks.on_this_machine() * (windows.length - 1) * vocabulary, folder)
        with torch.inference_mode(), progress_bar("base", progress) as bar:
            task = bar.add_task("base", total=count)
            of = loaded(model, windows, device)
            for span in spans:
                file = Path(place) / f"{span.start}.npy"
                try:
                    np.save(file, of(span).cpu().numpy())
                except OSError as error:
                    raise LlmqError(
                        f"{file} cannot be written: {error.strerror}; lower --max-windows, or give another --out"
                    ) from error
                bar.advance(task, len(span))
        del model, of
        gc.collect()
        # The file is bit for bit what was computed, so the results equal those with two models in memory.
        yield lambda span: torch.from_numpy(np.load(Path(place) / f"{span.start}.npy")).to(device)


def log_softmax(logits: Tensor) -> Tensor:
    """The log-softmax in float64, some rows at a time."""
    return torch.cat([logits[i : i + _ROWS].double().log_softmax(-1) for i in range(0, len(logits), _ROWS)])


def _check_disk(needed: int, folder: Path) -> None:
    import shutil

    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LlmqError(
            f"the two models do not fit in memory together, and the base's log-probabilities need "
            f"{needed / 2**30:.1f} GiB in {folder} where {free / 2**30:.1f} GiB are free: lower --max-windows, or give "
            "another --out"
        )
