"""Checks of a checkpoint that reads images: quantized, loaded as the class that its config.json names, compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks
import pictures
import tiny_vision
import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Whole:
    """A quantized checkpoint beside its source with llmq's weights from memory.

    text, image: how far its logits are from those, of text and of one image and text, None if it reads no image; moved:
    how far those of text are from the source's; seeing: how far those of another image are; copied: the names of
    tensors that are the source's, bit for bit; faults: what is not as it should be.
    """

    text: float
    image: float | None
    moved: float
    seeing: float | None
    blocks: int
    share: str
    left: list[str]
    copied: list[str]
    faults: list[str]


def quantized(name: str, source: Path, out: Path, windows: Tensor, ids: Tensor, loader: str = "any") -> Whole:
    """Quantize the tiny checkpoint of a type in `source` and compare. Raises as checks.quantize.

    loader: as in checks.quantized.
    """
    kind = tiny_vision.kind(name)
    run = checks.quantize(source, out, windows, loader=loader)
    reference, lacking = stock(kind, source)
    before, pictured, other = checks.logits(reference, ids), see(reference, 0), see(reference, 5)
    names = run.give(reference)
    text, image = checks.logits(reference, ids), see(reference, 0)
    faults: list[str] = []
    loaded: Any
    if loader == "llmq":
        import llmq

        checks.refuse(out, kind)
        loaded = llmq.load(out, dtype="float32", device_map="cpu")
    else:
        loaded, told = stock(kind, out)
        faults += [f"{what}: {', '.join(sorted(told[what] - lacking[what])[:3])}" for what in told]
        faults = [fault for fault in faults if not fault.endswith(": ")]
    if not isinstance(loaded, kind):
        faults.append(f"llmq.load opens it as {type(loaded).__name__}, which reads no images")
        image = None
    copied, changed = compared(stock(kind, source)[0], loaded, names) if isinstance(loaded, kind) else ([], [])
    if changed:
        faults.append(f"{len(changed)} tensors are not the source's, {changed[0]} among them")
    share, left = checks.shares(run)
    return Whole(
        text=checks.apart(checks.logits(loaded, ids), text),
        image=None if image is None else checks.apart(_sure(see(loaded, 0)), image),
        moved=checks.apart(text, before),
        seeing=None if pictured is None else checks.apart(_sure(other), pictured),
        blocks=len(run.plan.structure.blocks),
        share=share,
        left=left,
        copied=copied,
        faults=faults,
    )


def stock(kind: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """A checkpoint as a class of stock transformers loads it, in float32; what that says of it."""
    loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, told = loaded
    return model.eval(), {what: {str(one) for one in told[what]} for what in told}


def see(model: PreTrainedModel, seed: int) -> Tensor | None:
    """The logits of an image and a text; None if the model reads no image."""
    if not pictures.reads_images(model):
        return None
    inputs = pictures.seen(model, seed)
    return checks.logits(model, inputs.pop("input_ids"), **inputs)


def _sure(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def compared(source: PreTrainedModel, loaded: PreTrainedModel, names: set[str]) -> tuple[list[str], list[str]]:
    """The tensors of the source that are in a quantized model, bit for bit, and the others but for `names`."""
    theirs = loaded.state_dict()
    rest = {name: value for name, value in source.state_dict().items() if name not in names}
    changed = [name for name, value in rest.items() if name not in theirs or not torch.equal(theirs[name], value)]
    return [name for name in rest if name not in changed], changed
