"""How much of a tune survives in a written folder: of each weight's change, and of the gain in held-out loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmq import formats, methods
from llmq.adapters.finetune import examples
from llmq.adapters.merged import Merged
from llmq.adapters.settings import Settings
from llmq.checkpoint.source import FolderSource
from llmq.data import instructions
from llmq.errors import LlmqError
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.inference.pretrained import load_model, load_tokenizer
from llmq.methods.base import Method
from llmq.report.report import Report
from llmq.report.rows import WeightRow
from llmq.training.steps import held_out_loss
from llmq.watch import Watch


@dataclass(frozen=True)
class Retention:
    """How much of the adapter's change D of one weight W survives in the written weight Q, with E = Q − (W + D).

    survived: 1 + ⟨E, D⟩ / ⟨D, D⟩, the share of D, along its own direction, that is in Q; 1 is all of it. snr: ‖D‖ /
    ‖E‖, below 1 if rounding moved the weight further than the tune did, None if E is zero. change: ‖D‖ / ‖W + D‖.
    naive_…: the same for rounding each merged weight to nearest on the same grid; None if the weight was not quantized.
    """

    name: str
    survived: float
    snr: float | None
    change: float
    naive_survived: float | None = None
    naive_snr: float | None = None


def measure(source: Merged, out: Path, report: Report | None, watch: Watch) -> list[Retention]:
    """The retention of each changed weight in the written folder. Reads one weight at a time."""
    written = FolderSource(out, source.trust_remote_code, quantized_ok=True)
    rows = {} if report is None else {row.name: row for row in report.quantized}
    moved = report is not None and any(transforms(name) for name in report.recipe["methods"])
    # A method that moves scales also multiplies norms and biases, by factors that are not recorded.
    changed = [
        n for n, change in source.changes.items() if change.own and not (moved and len(source.info(n).shape) == 1)
    ]
    watch.stage("Measuring", len(changed))
    left = []
    for name in changed:
        exact, delta = source.exact(name)
        assert delta is not None
        row = rows.get(name.removesuffix(".weight"))
        if row is None:
            left.append(Retention(name, *retention(written.read(name).float(), exact, delta)))
        else:
            value = stored(written, row)
            if moved:
                factor = scales(value, exact)
                exact, delta = exact * factor, delta * factor
            naive = rounded(exact.to(source.info(name).dtype), row.scheme)
            left.append(Retention(name, *retention(value, exact, delta), *retention(naive, exact, delta)[:2]))
        watch.step("")
    return left


def held_out_rows(source: Merged) -> tuple[instructions.Example, ...]:
    """The rows that were held out from the tune. Raises LlmqError if its record or its data is missing."""
    record = source.adapter.record
    if record.get("before") is None or not all(Path(file).is_file() for file in record["data"]):
        raise LlmqError(
            f"--loss needs the tune's held-out rows, and {source.adapter.folder} has no record of them, or its data "
            "file was moved: leave out --loss"
        )
    tokenizer = load_tokenizer(source.tokenizer.folder, trust_remote_code=source.trust_remote_code)
    data, *more = (Path(file) for file in record["data"])
    return examples(tokenizer, Settings(**record["settings"]), data, more[0] if more else None)[1].all


def measure_loss(source: Merged, out: Path, rows: tuple[instructions.Example, ...], device: str) -> dict[str, float]:
    """MergeReport.losses."""
    record = source.adapter.record
    model = load_model(out, dtype=record["base"]["dtype"], device=device, trust_remote_code=source.trust_remote_code)
    merged = held_out_loss(model, rows, record["settings"]["batch"], device)
    return {"base": record["before"], "tuned": record["after"], "merged": merged}


def retention(value: Tensor, exact: Tensor, delta: Tensor) -> tuple[float, float | None, float]:
    """(survived, snr, change) of Retention, from float32 tensors of one shape: the written weight, W + D, and D."""
    error = (value - exact).double().flatten()
    change = delta.double().flatten()
    size = float(change @ change)
    if not size:
        return 1.0, None, 0.0
    apart, whole = float(error.norm()), float(exact.double().norm())
    return 1 + float(error @ change) / size, size**0.5 / apart if apart else None, size**0.5 / max(whole, 1e-30)


def stored(written: FolderSource, row: WeightRow) -> Tensor:
    """A quantized weight of the written folder, dequantized to float32."""
    kind = formats.of(row.scheme)
    names = {suffix: f"{row.name}.{suffix}" for suffix in kind.spec(row.shape, row.scheme, torch.float32)}
    tensors = {suffix: written.read(name) for suffix, name in names.items() if name in written}
    return kind.unpack(tensors, row.scheme).dequantize(torch.float32)


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight rounded to nearest on the scheme's grid, with min–max ranges where the grid has them; float32."""
    how = "minmax" if "minmax" in scheme.rules.ranges else None
    return round_to_nearest(weight, scheme, weight.dtype, how).dequantize(torch.float32)


def transforms(method: str) -> bool:
    """Whether a method rescales weights before it quantizes them."""
    return methods.find(method).transform is not Method.transform


def scales(value: Tensor, exact: Tensor, rounds: int = 3) -> Tensor:
    """The row and column factors by which a method's transform scaled a weight, found by least squares; [out, in].

    The written weight is r·W·c and a rounding error; the error is almost uncorrelated with W, so alternating least
    squares finds r and c with a relative error of about the rounding error over √out (or √in).
    """
    rows = torch.ones(exact.shape[0], 1)
    columns = torch.ones(1, exact.shape[1])
    for _ in range(rounds):
        scaled = exact * rows
        columns = (value * scaled).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True).clamp_min(1e-30)
        scaled = exact * columns
        rows = (value * scaled).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp_min(1e-30)
    return rows * columns
