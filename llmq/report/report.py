"""What a run did: report.json, which the terminal's summary, report.html and the model card are made of."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.checkpoint.files import REPORT
from llmq.errors import LlmqError
from llmq.machine import peak_memory
from llmq.planning.plan import Plan

VERSIONS = ("llmq", "torch", "transformers", "safetensors", "compressed-tensors", "bitsandbytes")
RECORDED = ("error", "seconds", "log", "memory", "peak", "device")


@dataclass
class Report:
    """Everything a run did. weights: one row per weight with two or more axes, kept ones with their reason.

    error: relative Frobenius error of a weight, or of a block's output on the calibration windows. Sizes in bytes,
    times in seconds, peak_memory the largest resident size of the process that finished the run. command: the command
    line that does the same again from the recipe in a file `recipe.yaml`. A block's memory and peak: the resident size
    of the process that quantized it, at its end, and the largest until then; device: on a GPU, the most that tensors
    took there while the block was quantized.
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
    weights: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    warnings: list[str]
    format: str = ""
    predicted_device_memory: int = 0
    loaders: list[str] = field(default_factory=list)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Source bytes over written bytes."""
        return self.source_bytes / max(1, self.bytes)

    @property
    def fallbacks(self) -> list[tuple[str, str]]:
        """(weight, note) for everything that did not go the usual way."""
        return [(row["name"], note) for row in self.weights for note in row.get("notes", [])]

    @property
    def undone(self) -> list[tuple[str, str]]:
        """(block, what) for everything that was tried and undone, because the block's error did not fall."""
        return [(b["name"], describe(line)) for b in self.blocks for line in b.get("log", []) if not line["kept"]]

    def to_json(self) -> str:
        """The text of report.json."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether the folder has a report."""
        return (folder / REPORT).is_file()

    @staticmethod
    def load(folder: Path) -> Report:
        """The report of a finished folder. Raises LlmqError where there is none."""
        try:
            return Report(**json.loads((folder / REPORT).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise LlmqError(f"{folder / REPORT}: cannot be read as a report: {error}") from error


def whole(line: dict[str, Any]) -> bool:
    """Whether a line of a block's log judges the block as it is written, not one pair rounded in the simplest way."""
    return ": " not in line["what"]


def describe(line: dict[str, Any]) -> str:
    """A line of a block's log in words: what was tried, and the block's error before and after."""
    after = "" if line.get("after") is None else f" → {line['after']:.4f}"
    why = f" ({line['why']})" if line.get("why") else ""
    return f"{line['what']}: error {line['before']:.4f}{after}{why}"


def versions() -> dict[str, str]:
    """The versions that can change the bytes written."""
    return {name: version(name) for name in VERSIONS} | {"python": sys.version.split()[0]}


def make_report(
    plan: Plan, model: str, out: Path, done: dict[str, Any], seconds: float, written: int, command: str = ""
) -> Report:
    """Put the rows of the blocks (from the sink's journal) together with what the plan left alone."""
    blocks, weights = [], []
    for index, block in enumerate(plan.structure.blocks):
        payload = done[f"block {index}"]
        # A journal that an earlier llmq began has no memory in it, and a host no device.
        kept = {key: payload[key] for key in RECORDED if key in payload}
        blocks.append({"name": block.name, **kept})
        weights += [{**row, "block": index} for row in payload["weights"]]
    for item in plan.weights:
        if item.scheme is None:
            weights.append(
                {
                    "name": item.name,
                    "shape": list(item.shape),
                    "block": item.block,
                    "scheme": None,
                    "bytes": item.before,
                    "error": 0.0,
                    "kept": str(item.reason),
                }
            )
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
        warnings=plan.warnings,
        format=formats.name(plan.schemes),
        loaders=formats.loaders(plan.schemes),
        command=command,
        versions=versions(),
    )
