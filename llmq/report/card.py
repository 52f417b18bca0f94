"""The model card, README.md of a written folder: metadata for the hub, how to load it, measured results."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmq.checkpoint.files import CARD, write
from llmq.errors import LlmqError, first_line
from llmq.machine import size
from llmq.report.experts import experts_of
from llmq.report.measured import NO_QUALITY, Measure, Row, rows
from llmq.report.report import Report

COPIED = ("license", "license_name", "license_link", "language")
"""The keys that are copied from the metadata of the source's card."""
FOLDER = "PATH_TO_THIS_FOLDER"
_BEGIN, _END = "<!-- measured by llmq eval -->", "<!-- end of measured -->"
_INDEX_BEGIN, _INDEX_END = "# measured by llmq eval", "# end of measured"
_INDEX = re.compile(f"^{_INDEX_BEGIN}\n.*?^{_INDEX_END}\n", re.MULTILINE | re.DOTALL)
_METADATA = re.compile(r"(---\n)(.*?^)(---\n.*)", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r'^path = ".*"$', re.MULTILINE)


def model_card(report: Report, source: Path, measured: Sequence[Row] = ()) -> str:
    """README.md of a written folder. source: the folder that was quantized; its card has the licence."""
    base = hub_id(report.model, source)
    name = Path(report.out).name
    left = sorted({str(row.reason) for row in report.kept})
    what = f"[{base}](https://huggingface.co/{base})" if base else Path(report.model).name
    methods = " + ".join(report.recipe["methods"])
    return f"""---
{_metadata(report, base, source)}
---

# {name}

{what}, quantized with {methods} to {_kinds(report)}: {report.bits_per_weight:.2f} bits per quantized \
weight, {report.bits_per_weight_whole:.2f} over the whole model, {size(report.bytes)} instead of \
{size(report.source_bytes)}.

{_BEGIN}
{measured_section(measured)}{_END}
{_bits(report)}
## How to load it

{_usage(report)}
## How it was made

By [llmq](https://pypi.org/project/llmq/) {report.versions.get("llmq", "")}. `report.html` shows the error of every \
weight; `report.json` has every number and the recipe.

- methods: {methods}
- format: {report.format}
- calibration: {report.calibration}
{_outside(report)}{_experts(report)}{_cache(report)}{_tuned(report)}\
- not quantized: {"; ".join(left) or "nothing"}
- verified: {_verified(report)}
"""


def hub_id(model: str, source: Path | None = None) -> str | None:
    """A model's id on the hub, if known: from the name that the user gave, or from its folder in the hub's cache."""
    if model != "demo" and not Path(model).is_absolute():
        return model
    for part in source.parts if source is not None and model != "demo" else ():
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return None


def measured_section(measured: Sequence[Row]) -> str:
    """The table of measurements with its protocols; '' if nothing was measured."""
    if not measured:
        return ""
    lines = ["## Measured", "", "| task | metric | value | 95 % interval | base | recovery |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in measured:
        cells = (row.task, row.metric, row.value, row.interval, row.base, row.recovery)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    protocols = {row.number: row.protocol for row in measured if row.protocol}
    told = (f"- [{number}] {' '.join(protocol.split())}" for number, protocol in protocols.items())
    return "\n".join([*lines, "", *told, ""])


def write_measured(folder: Path, measures: Iterable[Measure], base: Iterable[Measure] = ()) -> Path:
    """Write the table of measurements to a folder's card, and measures of quality to the card's metadata.

    An earlier table is replaced. Raises LlmqError if there is no card by llmq, or it cannot be written.
    """
    text = _read(folder)
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise LlmqError(f"{folder / CARD} has no place for measured numbers: llmq did not write it")
    measures = list(measures)
    return _write(folder, _indexed(f"{before}{begin}\n{measured_section(rows(measures, base))}{end}{after}", measures))


def _indexed(card: str, measures: Sequence[Measure]) -> str:
    """A card with the measures as a model-index, which the hub displays and searches.

    Other metadata is unchanged; so is a model-index that llmq did not write.
    """
    without = _INDEX.sub("", card)
    parts = _METADATA.match(without)
    of = [m for m in measures if m.higher_is_better is not None and m.task.partition(":")[0] not in NO_QUALITY]
    of = [m for m in of if math.isfinite(m.value)]
    if parts is None or not of or re.search(r"^model-index:", parts[2], re.MULTILINE):
        return without
    begin, metadata, rest = parts.groups()
    title = re.search(r"^# (.+)$", rest, re.MULTILINE)
    return f"{begin}{metadata}{_INDEX_BEGIN}\n{_index(title[1] if title else 'model', of)}{_INDEX_END}\n{rest}"


def _index(name: str, measures: Sequence[Measure]) -> str:
    """The YAML of a model-index."""
    import yaml
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            "text-generation",
            m.task,
            m.task.rpartition(":")[2],
            m.metric,
            float(f"{m.value:.6g}"),
            metric_args={"protocol": m.protocol},
        )
        for m in measures
    ]
    index = {"model-index": eval_results_to_model_index(name, results)}
    return yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=10_000)


def write_place(folder: Path, place: str) -> None:
    """Make the card's example load the model from `place`, a repository on the hub. Other cards are unchanged."""
    text = _read(folder)
    changed = _PLACE.sub(lambda _: f'path = "{place}"', text)
    if changed != text:
        _write(folder, changed)


def _metadata(report: Report, base: str | None, source: Path) -> str:
    from huggingface_hub import ModelCardData

    given: dict[str, Any] = {}
    if base:
        given |= {"base_model": base, "base_model_relation": "quantized"}
    bits = sorted({row.scheme.bits for row in report.quantized})
    tags = ["llmq", report.format.partition(" ")[0], *(f"{count}-bit" for count in bits)]
    known = source_metadata(source)
    given |= {key: known[key] for key in COPIED if known.get(key)}
    # What a model does that another class opens, images and text for example, only its own card says.
    task = "text-generation" if report.opener == "AutoModelForCausalLM" else known.get("pipeline_tag")
    given |= {"pipeline_tag": task} if task else {}
    return str(ModelCardData(library_name="transformers", tags=tags, **given).to_yaml())


def source_metadata(source: Path) -> dict[str, Any]:
    """The metadata of a folder's own card; empty if there is none or it cannot be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(source / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _kinds(report: Report) -> str:
    return ", ".join(sorted({row.scheme.told for row in report.quantized}))


def _bits(report: Report) -> str:
    """A paragraph on the bits of the weights, if a run chose them: how many have which, and what that cost."""
    if report.chosen is None:
        return ""
    counts = Counter(row.scheme for row in report.quantized)
    alike = len({scheme.bits for scheme in counts}) == len(counts)
    ordered = sorted(counts.items(), key=lambda item: (item[0].bits, str(item[0])))
    told = [
        f"{count:,} {'is' if count == 1 else 'are'} {f'{scheme.bits}-bit' if alike else scheme}"
        for scheme, count in ordered
    ]
    told += [f"{len(report.kept):,} not quantized"] if report.kept else []
    sentences = filter(None, (f"Of the weights, {', '.join(told)}", str(report.chosen), report.chosen.beside))
    return f"\n## Bits per weight\n\n{'. '.join(f'{text[0].upper()}{text[1:]}' for text in sentences)}.\n"


def _experts(report: Report) -> str:
    """A line on the routed experts, if there are any, and how many tokens they were calibrated with."""
    found = experts_of(report)
    if not found:
        return ""
    counts = [tokens for experts in found for tokens, _ in experts.each if tokens is not None]
    told = f"- experts: {sum(len(experts.each) for experts in found):,} in {len(found)} blocks"
    if counts and any(row.alpha is not None for row in found[0].rows):
        told += f", each chosen by {min(counts):,} to {max(counts):,} calibration tokens"
        told += f" ({sum(count == 0 for count in counts):,} by none)"
    return f"{told}\n"


def _outside(report: Report) -> str:
    """A line on the weights outside the blocks, if some are quantized beside those in blocks."""
    mine = [row for row in report.quantized if row.block is None]
    if not mine or not report.blocks:
        return ""
    notes = {note for row in mine for note in row.notes if note.startswith("no calibration")}
    return f"- outside the decoder's blocks: {len(mine):,} weights, {next(iter(notes), 'no calibration')}\n"


def _tuned(report: Report) -> str:
    """A line on the training of the whole model after its blocks, if there was one."""
    return "" if report.tuned is None else f"- {report.recipe['methods'][-1]}: {report.tuned}\n"


def _cache(report: Report) -> str:
    """A line on the rounding of keys and values, if they are rounded."""
    return "" if report.cache is None else f"- cache: {report.cache}\n"


def _verified(report: Report) -> str:
    said = ["every block was read back from disk and gave the same output as in memory"] * bool(report.blocks)
    if any(row.block is None for row in report.quantized):
        what = "every weight outside the blocks" if report.blocks else "every quantized weight"
        said.append(f"{what} was read back from disk and has the same values as in memory")
    return "; ".join(said)


def _usage(report: Report) -> str:
    said = "".join(f"- {loader}\n" for loader in report.loaders)
    text = said
    if name := report.recipe.get("model_class"):
        return f"""{text}
```python
from transformers import {name}

model = {name}.from_pretrained("{FOLDER}", device_map="auto")
```

`llmq.load("{FOLDER}")` opens it with its weights packed.
"""
    if "transformers" in report.examples:
        text += f"""
```python
from transformers import {", ".join(sorted([report.opener, "AutoTokenizer"]))}

path = "{FOLDER}"
model = {report.opener}.from_pretrained(path, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("The answer is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""
    if "llmq" in report.examples:
        text += f"""
```python
import llmq
from transformers import AutoTokenizer

path = "{FOLDER}"
model = llmq.load(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("The answer is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""
    if "vllm" in report.examples:
        text += f"""
With vLLM{"" if report.examples["vllm"] else ", where this was not run"}:

```python
from vllm import LLM, SamplingParams

path = "{FOLDER}"
print(LLM(path).generate("The answer is", SamplingParams(max_tokens=40))[0].outputs[0].text)
```
"""
    return text


def _read(folder: Path) -> str:
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmqError(f"{folder / CARD}: cannot be read: {first_line(error)}") from error


def _write(folder: Path, text: str) -> Path:
    write(folder / CARD, text)
    return folder / CARD
