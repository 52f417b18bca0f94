"""The report of a run: report.json, from which the terminal's summary, report.html and the model card are made."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.block.attempt import Attempt, Outcome
from llmq.checkpoint.files import REPORT
from llmq.discovery.architecture import generator
from llmq.errors import LlmqError, first_line
from llmq.machine import peak_memory
from llmq.planning.cache import CachePlan
from llmq.planning.plan import Plan
from llmq.report.bits import BitsRow, read_bits
from llmq.report.rows import (
    BlockRow,
    CacheRow,
    KeptRow,
    TuneRow,
    WeightRow,
    read_block,
    read_cache,
    read_tune,
    read_weight,
    told_corrections,
)
from llmq.training.distill import STAGE

VERSIONS = ("llmq", "torch", "transformers", "safetensors", "compressed-tensors", "bitsandbytes")


@dataclass
class Report:
    """The results of a run. weights: one row per weight with two or more axes, unquantized ones with their reason.

    Sizes are in bytes, times in seconds; peak_memory: the largest resident size of the process that finished the run;
    command: the command line that repeats the run with the recipe in a file `recipe.yaml`; examples: the tools whose
    example code the card shows, and whether they were tried; opener: the class of transformers that opens the folder;
    tuned: the training of the whole model after its blocks, if the recipe has a method that does so; chosen: how the
    bits of the weights were chosen, if a budget was given; cache: how keys and values are rounded, if they are.
    `llmq.report.rows` defines the rows; report.json has the same fields under the same names.
    """

    model: str
    out: str
    recipe: dict[str, Any]
    calibration: str
    bits_per_weight: float
    bits_per_weight_whole: float
    source_bytes: int
    bytes: int
    peak_memory: int
    predicted_memory: int
    seconds: float
    weights: list[WeightRow | KeptRow]
    blocks: list[BlockRow]
    warnings: list[str]
    format: str = ""
    predicted_device_memory: int = 0
    loaders: list[str] = field(default_factory=list)
    examples: dict[str, bool] = field(default_factory=dict)
    opener: str = "AutoModelForCausalLM"
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    tuned: TuneRow | None = None
    chosen: BitsRow | None = None
    cache: CacheRow | None = None

    @property
    def ratio(self) -> float:
        """Source bytes over written bytes."""
        return self.source_bytes / max(1, self.bytes)

    @property
    def fallbacks(self) -> list[tuple[str, str]]:
        """(weight, note) for every fallback."""
        return [(row.name, note) for row in self.quantized for note in row.notes]

    @property
    def quantized(self) -> list[WeightRow]:
        """The weights that are quantized, in the order of their blocks."""
        return [row for row in self.weights if isinstance(row, WeightRow)]

    @property
    def kept(self) -> list[KeptRow]:
        """The weights that are not quantized."""
        return [row for row in self.weights if isinstance(row, KeptRow)]

    @property
    def corrections(self) -> str | None:
        """In a sentence, which weights were corrected for the errors of earlier ones; None if none was."""
        return told_corrections(self.quantized)

    def attempts(self, *outcomes: Outcome) -> list[tuple[str, Attempt]]:
        """(block, attempt) for every attempt of a method with one of these outcomes."""
        return [(block.name, attempt) for block in self.blocks for attempt in block.log if attempt.outcome in outcomes]

    def to_json(self) -> str:
        """The text of report.json."""
        return json.dumps(_plain(self), indent=1, sort_keys=True, default=_plain) + "\n"

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether the folder has a report."""
        return (folder / REPORT).is_file()

    @staticmethod
    def load(folder: Path) -> Report:
        """The report of a finished folder. Raises LlmqError if there is none."""
        try:
            return Report.from_dict(json.loads((folder / REPORT).read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, LlmqError) as error:
            raise LlmqError(
                f"{folder / REPORT}: cannot be read as a report ({first_line(error)}): quantize again into another "
                "folder, or take the file away"
            ) from error

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """A report from the data of report.json; files of earlier versions are accepted too.

        Raises KeyError, TypeError, ValueError, AttributeError or LlmqError if the data is not a report.
        """
        weights = [read_weight(row) for row in data["weights"]]
        blocks = [read_block(row) for row in data["blocks"]]
        tuned, chosen = read_tune(data.get("tuned")), read_bits(data.get("chosen"))
        read = {"tuned": tuned, "chosen": chosen, "cache": read_cache(data.get("cache"))}
        return Report(**{**data, "weights": weights, "blocks": blocks, **read})


def _plain(row: Any) -> dict[str, Any]:
    """The fields of a dataclass: `asdict` copies every number of every row as well."""
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def versions() -> dict[str, str]:
    """The versions of packages that can change the written bytes."""
    return {name: version(name) for name in VERSIONS} | {"python": sys.version.split()[0]}


def make_report(
    plan: Plan, model: str, out: Path, done: dict[str, Any], seconds: float, written: int, command: str = ""
) -> Report:
    """A report from the rows of the blocks (in the sink's journal) and the weights that the plan does not quantize."""
    blocks, weights = [], []
    for index, block in enumerate(plan.structure.blocks):
        *groups, last = plan.blocks[index].units
        log = [attempt for unit in (last, *groups) for attempt in done[unit].get("log", ())]
        blocks.append(read_block({"name": block.name, **done[last], "log": log}))
        weights += [read_weight({"block": index, **row}) for unit in (last, *groups) for row in done[unit]["weights"]]
    inside = {unit for block in plan.blocks for unit in block.units}
    rest = [payload for unit, payload in done.items() if unit not in inside]
    weights += [read_weight(row) for payload in rest for row in payload.get("weights", ())]
    silent = [block.name for block in blocks if block.zero]
    silent_note = (
        f"the output of {', '.join(silent[:3])}{f' and {len(silent) - 3} more' if len(silent) > 3 else ''} is zero for "
        "every calibration window, before quantization as well: there is no relative error, and nothing was calibrated"
    )
    for item in plan.weights:
        if item.reason is not None:
            weights.append(KeptRow(item.name, item.shape, item.block, item.before, item.reason))
    return Report(
        model=model,
        out=str(out),
        recipe=plan.recipe.to_dict(),
        calibration=plan.calibration.description,
        bits_per_weight=plan.bits_per_weight,
        bits_per_weight_whole=16 * written / max(1, plan.source.total_bytes) * plan.dtype.itemsize / 2,
        source_bytes=plan.source.total_bytes,
        bytes=written,
        peak_memory=peak_memory(),
        predicted_memory=plan.budget.memory,
        predicted_device_memory=plan.budget.device_memory,
        seconds=round(seconds, 2),
        weights=weights,
        blocks=blocks,
        warnings=[*plan.warnings, *([silent_note] if silent else [])],
        format=formats.name(plan.schemes),
        loaders=[loader.sentence for loader in plan.loaders],
        examples={loader.code: loader.tried for loader in plan.loaders if loader.code},
        opener=plan.recipe.model_class or generator(plan.model.config).__name__,
        command=command,
        versions=versions(),
        tuned=read_tune(done.get(STAGE)),
        cache=None if plan.cache is None else _cache(plan.cache, done),
    )


def _cache(plan: CachePlan, done: Mapping[str, Any]) -> CacheRow:
    """The row of a cache, with the scales that are in the journal."""
    scales = {name: pair for payload in done.values() for name, pair in payload.get("cache", {}).items()}
    return CacheRow(str(plan.cache), {name: (tuple(k), tuple(v)) for name, (k, v) in scales.items()}, plan.without)
