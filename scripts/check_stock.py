"""Check that stock transformers, in an environment without llmq, reads llmq's output.

    python scripts/check_stock.py --python PLAIN_ENV/bin/python MODEL [MODEL …]

Quantizes each model at 8, 4, 3 and 2 bits, by group and by channel, and keeps the run's quantized weights in memory;
loads the folder with the other interpreter (transformers and compressed-tensors only), and compares logits in float32.
Prints one line per case and fails above a relative error of 1e-3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq.block.block import Block
from llmq.checkpoint.hub import resolve
from llmq.grids.scheme import Scheme
from llmq.planning.plan import BlockPlan
from llmq.recipe.recipe import Recipe
from llmq.streaming import stream

LIMIT = 1e-3
READER = """
import importlib.util, sys
assert importlib.util.find_spec("llmq") is None, "llmq is installed in the environment that is to do without it"
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
want = load_file(sys.argv[2])
with torch.inference_mode():
    have = model(want["ids"]).logits
print(float((have - want["logits"]).norm() / want["logits"].norm()))
"""


@contextmanager
def kept_in_memory() -> Iterator[dict[str, Tensor]]:
    """The run's quantized weights from memory, dequantized to float32, by parameter name."""
    kept: dict[str, Tensor] = {}
    pack = stream.pack_weights

    def keep(plan: BlockPlan, block: Block) -> Any:
        prefix = plan.name
        for work in block.weights.values():
            assert work.quantized is not None
            kept[f"{prefix}.{work.parameter}"] = work.quantized.dequantize(torch.float32)
        for name in block.changed:
            kept[f"{prefix}.{name}"] = block.module.get_parameter(name).float().clone()
        return pack(plan, block)

    stream.pack_weights = keep
    try:
        yield kept
    finally:
        stream.pack_weights = pack


def logits_in_memory(model: str, kept: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The float32 logits of the unquantized model with the run's dequantized weights."""
    dense = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32)
    missing, unexpected = dense.load_state_dict(kept, strict=False)
    assert not unexpected and kept, unexpected
    with torch.inference_mode():
        logits: Tensor = dense(ids).logits
    return logits


def main() -> None:
    """Every model × bits × group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that loads the result")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--method", default="gptq")
    args = parser.parse_args()
    worst = 0.0
    for model in args.models:
        vocabulary = json.loads((resolve(model) / "config.json").read_text())["vocab_size"]
        ids = torch.randint(vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
        for bits in args.bits:
            for group in (128, None):
                with tempfile.TemporaryDirectory() as folder, kept_in_memory() as kept:
                    recipe = Recipe(methods=tuple(args.method.split("+")), scheme=Scheme(bits, group), ragged="smaller")
                    llmq.quantize(model, Path(folder) / "out", recipe, ids=ids)
                    logits = logits_in_memory(model, kept, ids)
                    save_file({"ids": ids, "logits": logits}, Path(folder) / "logits.safetensors")
                    command = [args.python, "-c", READER, f"{folder}/out", f"{folder}/logits.safetensors"]
                    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
                if done.returncode:
                    sys.exit(f"{model} {recipe.scheme}: {done.stderr[-2000:]}")
                error = float(done.stdout.strip().splitlines()[-1])
                worst = max(worst, error)
                print(f"{model:<40} {recipe.scheme!s:<28} relative error of the logits {error:.2e}", flush=True)
    print(f"worst {worst:.2e}, limit {LIMIT:.0e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
