"""Merge a LoRA adapter into its base, quantize the result by any recipe, and measure how much of the tune survives.

An adapter's change is small compared with the steps of a 4-bit grid, so merging it into quantized weights, or rounding
the merged weights to nearest, can lose much of it. Here the change is added in float32 to the weights that it was
trained against, and the sum is quantized like any checkpoint, calibrated on text like the tune's. The part of the
change that survives is measured on the written folder (`survival`).
"""

from __future__ import annotations

import json
import math
import shlex
import time
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmq import job, methods
from llmq.adapters.lora import Adapter
from llmq.adapters.merged import Merged, open_base
from llmq.adapters.survival import Retention, held_out_rows, measure, measure_loss
from llmq.checkpoint import hub
from llmq.checkpoint.claim import refuse_foreign
from llmq.checkpoint.files import write
from llmq.data import instructions
from llmq.data.calibration import Windows
from llmq.data.files import ENDINGS
from llmq.data.opened import suffix
from llmq.data.tokens import encode
from llmq.export.dense import write_plain
from llmq.inference.pretrained import load_tokenizer
from llmq.machine import check_device
from llmq.planning.memory import check_writable
from llmq.planning.plan import Plan, make_plan
from llmq.recipe.recipe import Calibration, Recipe
from llmq.watch import Silent, Watch

RECORD = "merge.json"


@dataclass
class MergeReport:
    """merge.json: what merging adds to the report of quantization. left: the retention of every weight that the adapter
    changes.

    losses: on the tune's held-out rows, nats per learned token: 'base' and 'tuned' from its record, 'merged' measured
    on the written folder; empty if no loss was requested.
    """

    base: str
    adapter: str
    trained_on: str
    bits: int
    recipe: dict[str, Any] | None
    calibration: str
    left: list[Retention]
    seconds: float
    notes: list[str] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> list[Retention]:
        """The weights that keep the smallest share of their change, the worst first."""
        return sorted(self.left, key=lambda one: math.inf if one.snr is None else one.snr)

    @property
    def kept(self) -> float | None:
        """The share of the tune's gain in held-out loss that the written model keeps; None if it was not measured."""
        if not self.losses or self.losses["base"] == self.losses["tuned"]:
            return None
        return (self.losses["base"] - self.losses["merged"]) / (self.losses["base"] - self.losses["tuned"])

    def mean(self, what: str) -> float | None:
        """The mean of a figure over all weights, or None where no weight has it."""
        values = [getattr(one, what) for one in self.left if getattr(one, what) is not None]
        return sum(values) / len(values) if values else None


def merge(
    base: str,
    adapter: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    plain: bool = False,
    trained_on: str = "auto",
    loss: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> MergeReport:
    """Merge a LoRA adapter (a folder) into a base (folder, hub id or 'demo') and write it to `out`, quantized.

    recipe: as in `llmq.quantize`; its calibration text may be rows as `llmq finetune` reads them. plain: write the
    merged weights as they are, in the base's dtype, instead. trained_on: see llmq.adapters.merged.Merged. loss: load
    the whole written model and measure its loss on the tune's held-out rows. Resumes as quantize does. Raises
    LlmqError, naming the first weight, if the adapter does not fit.
    """
    began, out, watch = time.perf_counter(), Path(out), watch or Silent()
    check_device(device)
    check_writable(out)
    refuse_foreign(out)
    folder = hub.resolve(base, trust_remote_code=trust_remote_code)
    source = Merged(open_base(folder, trust_remote_code), Adapter(Path(adapter)), trained_on)
    held_out = held_out_rows(source) if loss else ()
    notes = _notes(source, base)
    for note in notes:
        watch.note(note)
    if plain:
        for note in source.warnings:
            watch.note(note)
        report = None
        write_plain(source, out, watch)
    else:
        recipe = recipe or Recipe()
        made = plan(source, recipe, out, device)
        for note in made.warnings:
            watch.note(note)
        words = ["llmq", "merge", base, str(adapter), "-o", str(out), "--recipe", "recipe.yaml"]
        words += [] if trained_on == "auto" else ["--trained-on", trained_on]
        command = shlex.join(words)
        report = job.quantize(base, out, recipe, device=device, watch=watch, made=made, command=command)
    merged = MergeReport(
        base=base,
        adapter=str(source.adapter.folder.absolute()),
        trained_on=source.trained_on,
        bits=16 if report is None or recipe is None else recipe.scheme.bits,
        recipe=None if report is None else report.recipe,
        calibration="" if report is None else report.calibration,
        left=measure(source, out, report, watch),
        losses=measure_loss(source, out, held_out, device) if loss else {},
        seconds=round(time.perf_counter() - began, 2),
        notes=notes,
    )
    write(out / RECORD, json.dumps(asdict(merged), indent=1, sort_keys=True) + "\n")
    _complete_card(out, merged)
    return merged


def plan(source: Merged, recipe: Recipe, out: Path, device: str) -> Plan:
    """As job.plan, for a given source; calibrated on rows like the tune's if the calibration text has such rows."""
    methods.make(recipe)
    seen = copy(source)
    seen.folder = source.tokenizer.folder  # the calibration text is encoded as the merged model will be used

    def wanted(longest: int | None) -> Windows:
        found = tune_windows(source, recipe.calibration, longest)
        return found or job.calibration_windows(seen, recipe.calibration, recipe.seed, longest)

    return make_plan(source, recipe, wanted, out=out, device=device)


def tune_windows(source: Merged, calibration: Calibration, longest: int | None) -> Windows | None:
    """Windows of a file of rows (prompts and answers), laid out as for training; None for any other calibration text.

    If the recipe names no text and the tune's own data is still in its place, that data is used. If the data is shorter
    than one window, windows are shortened to it.
    """
    text = calibration.text
    note: tuple[str, ...] = ()
    data = source.adapter.record.get("data") or [""]
    if text == Calibration().text and Path(data[0]).is_file():
        text = data[0]
        note = (f"calibrating on the tune's own data, {text}; --calib gives another text",)
    file = Path(text).expanduser()
    if calibration.column is not None or suffix(file) not in ENDINGS or not file.is_file():
        return None
    tokenizer = load_tokenizer(source.tokenizer.folder, trust_remote_code=source.trust_remote_code)
    length = min(calibration.seqlen, longest or calibration.seqlen)
    template = source.adapter.record.get("settings", {}).get("template", "auto")
    rows = instructions.read(file, tokenizer, seqlen=length, template=template)
    end = tokenizer.eos_token_id
    ids = torch.tensor(list(instructions.joined(rows, encode("\n\n", tokenizer) if end is None else [end])))
    length = min(length, len(ids))
    count = min(calibration.samples, len(ids) // length)
    if count < calibration.samples:
        note = (*note, f"{file} has {len(ids)} tokens: {count} windows, not the {calibration.samples} asked for")
    taken = ids[: len(ids) // length * length].view(-1, length)
    picked = [i * len(taken) // count for i in range(count)]
    told = f"{file}: {count} windows of {length} tokens, rows laid out as for training"
    return Windows(taken[picked], note, told, tokenizer.decode(taken[picked[0]].tolist()))


def _notes(source: Merged, base: str) -> list[str]:
    """Notes for the user on how the adapter and the base fit together."""
    record, notes = source.adapter.record.get("base", {}), list(source.notes)
    rounded = sum(change.rounded for change in source.changes.values())
    if rounded:
        notes.append(f"{rounded} base weights are rounded to NF4 first: the adapter was trained against those values")
    elif not source.adapter.record and source.trained_on == "base":
        notes.append(
            "the adapter does not record its base's precision: give --trained-on nf4 if it was trained on an NF4 "
            "(QLoRA) base"
        )
    if record and source.base.fingerprint() != record.get("fingerprint"):
        notes.append(f"the adapter was trained on {record.get('model')}, and {base} is a different checkpoint")
    return notes


def _complete_card(out: Path, report: MergeReport) -> None:
    """Add one line to the model card: the weights include a merged adapter."""
    card = out / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {out.absolute().name}\n\n{report.base}.\n"
    note = f"\nMerged with the LoRA adapter {Path(report.adapter).name}: `merge.json` says how much of it is kept.\n"
    if note not in text:
        write(card, text + note)
