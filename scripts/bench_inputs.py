"""KL of rounding inputs alone, with exact weights: what rounding weights adds to, or makes up for.

    python scripts/bench_inputs.py MODEL CALIBRATION.txt HELDOUT.txt --grids nvfp4 mxfp4 mxfp8 fp8-block

Static scales (nvfp4) are of the largest inputs in 32 windows of 512 tokens; measured on the first 200 held-out windows
of 512: the model in bfloat16 with rounded inputs of all linear layers but the head, against itself in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_quality import divergence
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.data.tokens import tokenize
from llmq.grids.activations import round_groups, static_scale
from llmq.grids.table import inputs_of

CALIBRATION, HELDOUT, LENGTH = 32, 200, 512


def main() -> None:
    """Parse, round, print a line for each grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--grids", nargs="+", default=["nvfp4", "mxfp4", "mxfp8", "fp8-block"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    seen, held = (
        tokenize(file.read_text(encoding="utf-8"), tokenizer)[: count * LENGTH].view(count, LENGTH)
        for file, count in ((args.calibration, CALIBRATION), (args.heldout, HELDOUT))
    )
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    largest: dict[nn.Module, float] = {}
    with torch.inference_mode(), before_layers(model, partial(note, largest)):
        for row in seen:
            model(row[None])
    print("| grid | perplexity | KL | same top token |\n|---|---|---|---|")
    for grid in args.grids:
        with before_layers(model, partial(rounding, largest, grid)):
            perplexity, kl, same = divergence(base, partial(in_float32, model), held)
        print(f"| {grid} | {perplexity:.2f} | {kl:.5f} | {same:.4f} |", flush=True)


@contextmanager
def before_layers(model: Any, hook: Callable[[nn.Module, tuple[Tensor]], object]) -> Iterator[None]:
    """Within the context, a hook runs before every linear layer but the head."""
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not model.lm_head]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def in_float32(model: Any, ids: Tensor) -> SimpleNamespace:
    """A model's logits."""
    return SimpleNamespace(logits=model(ids).logits.float())


def rounding(largest: dict[nn.Module, float], grid: str, layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """A layer's inputs, rounded."""
    static = static_scale(largest[layer], grid) if "static" in inputs_of(grid).kinds else None
    return (round_groups(given[0], grid, static),)


def note(largest: dict[nn.Module, float], layer: nn.Module, given: tuple[Tensor]) -> None:
    """Keep the largest magnitude of a layer's inputs."""
    largest[layer] = max(largest.get(layer, 0.0), float(given[0].abs().amax()))


if __name__ == "__main__":
    main()
