"""Models as they are published this year, tiny: in FP8 or MXFP4, with images, with experts, or all at once.

    python scripts/check_published.py [--only 'glm*']

Each is made from its type's own configuration in transformers, its weights rewritten as the publisher stores them. It
goes through `plan`, `quantize` (GPTQ, 4 bits) and the loader that the plan names, and its logits are compared with
those of the unquantized model with llmq's weights from memory: on text, and on an image with text where it reads
images. The table is written to docs/published.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "architectures")]

import llmq  # noqa: E402
from llmq.formats.dequantized import open_source  # noqa: E402
from tests.architectures import checks, checks_vision, tiny, tiny_vision  # noqa: E402
from tests.llmq.formats import published  # noqa: E402

PAGE = ROOT / "docs" / "published.md"
HEAD = f"""# Models as they are published

Tiny random models of types published in 2025 and 2026, each from the type's own configuration in transformers
{transformers.__version__}, stored in a form in which such models are published. This page is written
by `scripts/check_published.py`.

Each went through `llmq plan`, `llmq quantize` (GPTQ, 4 bits, group size 32, one scale per row where 32 does not divide
the width) and the loader. **logits**: relative error to those of the unquantized model with llmq's weights from memory,
in float32, of text and of an image with text; at most 1e-3 passes. llmq's weights are bfloat16, so those that
transformers unpacks were rounded to it, too; those of `llmq.load` stay packed, so there what is not in few bits was
stored in float32. **moved**: how far quantization itself moves the logits of text. Weights outside the decoder's blocks
were those of the source, bit for bit, in the loaded model.

| model | type | stored as | experts | loaded by | quantized of 2-D block weights | logits: text | image | moved |
|---|---|---|---|---|---|---|---|---|
"""
OUTSIDE = ("vis", "tower", "projector", "embed")


@dataclass(frozen=True)
class Model:
    """A published model. like: its name; kind: its type; stored: how its weights are; change: writes them so."""

    like: str
    kind: str
    stored: str
    change: Callable[[Path], object]


def decoder_only(change: Callable[..., object], *args: Any, **options: Any) -> Callable[[Path], object]:
    """A rewriting that leaves what is beside the decoder alone, as publishers do."""

    def write(folder: Path) -> object:
        original = published.linear
        published.linear = lambda name: original(name) and not any(part in name for part in OUTSIDE)
        try:
            return change(folder, *args, **options)
        finally:
            published.linear = original

    return write


def in_bfloat16(folder: Path) -> object:
    """The folder with its tensors in bfloat16."""
    return published.rewrite(folder, None, lambda tensors: tensors)


def in_float32(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A rewriting, after which what is not in few bits is float32."""

    def write(folder: Path) -> object:
        change(folder)
        (file,) = folder.glob("*.safetensors")
        tensors = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        return (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))

    return write


TILES = decoder_only(published.fp8)
WHOLE = decoder_only(published.fp8, None)
MODELS = (
    Model("DeepSeek-V3.1", "deepseek_v3", "FP8, tiles", TILES),
    Model("Qwen3-30B-A3B-FP8", "qwen3_moe", "FP8, tiles", TILES),
    Model("MiniMax-M2", "minimax_m2", "FP8, tiles", TILES),
    Model("GLM-4.5V-FP8", "glm4v_moe", "FP8, tiles", TILES),
    Model("Qwen3-VL-8B-Instruct-FP8", "qwen3_vl", "FP8, tiles", TILES),
    Model("Devstral Small 2", "mistral3", "FP8, one scale per weight", WHOLE),
    Model("Qwen3.5-35B-A3B", "qwen3_5_moe", "bfloat16", in_bfloat16),
    Model("Kimi K2.5", "kimi_k25", "FP8, tiles", TILES),
    Model("gpt-oss-20b", "gpt_oss", "MXFP4", in_float32(published.experts_in_mxfp4)),
    Model("Gemma 4", "gemma4", "bfloat16", in_bfloat16),
    Model("Llama 4 Scout", "llama4", "bfloat16", in_float32(in_bfloat16)),
    Model("GLM-4.6", "glm4_moe", "FP8, tiles", TILES),
)


def check(model: Model, work: Path) -> dict[str, Any]:
    """A row of the table. Raises LlmqError if the plan refuses it."""
    vision = model.kind in tiny_vision.TYPES
    folder, dense, out = work / "source", work / "dense", work / "out"
    make: Any = tiny_vision.make if vision else tiny.make
    make(model.kind, folder)
    model.change(folder)
    kind: Any = tiny_vision.kind(model.kind) if vision else transformers.AutoModelForCausalLM
    windows, ids, loader = tiny.tokens(8, 64, seed=2), tiny.tokens(), "any"
    try:
        run = checks.quantize(folder, out, windows)
    except llmq.LlmqError as error:
        if "--loader llmq" not in str(error):
            raise
        loader = "llmq"
        run = checks.quantize(folder, out, windows, loader=loader)
    reference = checks_vision.stock(kind, written_dense(folder, dense))[0]
    plain = checks_vision.stock(kind, dense)[0]
    before = checks.logits(reference, ids)
    names = run.give(reference)
    if loader == "llmq":
        checks.refuse(out, kind)
        loaded = llmq.load(out, dtype="float32", device_map="cpu")
    else:
        loaded, told = checks_vision.stock(kind, out)
        assert not told["missing_keys"] and not told["mismatched_keys"], told
    checks.logits(loaded, ids)  # transformers unpacks the weights now
    if loader == "any":
        for name in names:
            parameter = loaded.get_parameter(name)
            parameter.data = parameter.data.bfloat16().float()
    _, changed = checks_vision.compared(plain, loaded, names)
    assert not changed, changed[:3]
    text = checks.logits(reference, ids)
    image = checks_vision.see(reference, 0) if vision else None
    return {
        "experts": "yes" if checks.is_mixture(plain) else "",
        "loader": "llmq.load" if loader == "llmq" else "transformers",
        "share": checks.shares(run)[0],
        "text": checks.apart(checks.logits(loaded, ids), text),
        "image": None if image is None else checks.apart(checks_vision.see(loaded, 0), image),
        "moved": checks.apart(text, before),
    }


def written_dense(folder: Path, dense: Path) -> Path:
    """The folder's values as a dense checkpoint."""
    source = open_source(folder)
    dense.mkdir()
    save_file({name: source.read(name).contiguous() for name in source.names()}, dense / "model.safetensors")
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (dense / "config.json").write_text(json.dumps(config))
    return dense


def main() -> None:
    """Check all, print the table, and write the page if none was left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="types whose name matches one of these")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines, failed = [], 0
    for model in MODELS:
        if only and not any(fnmatch.fnmatch(model.kind, pattern) for pattern in only):
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                row = check(model, Path(work))
                image = "" if row["image"] is None else f"{row['image']:.1e}"
                told = [row["experts"], row["loader"], row["share"], f"{row['text']:.1e}", image, f"{row['moved']:.2f}"]
                failed += not max(row["text"], row["image"] or 0.0) <= 1e-3
            except Exception as error:  # a model's code may raise anything; the others continue
                told, failed = [f"fails: {type(error).__name__}: {str(error)[:200]}", *[""] * 5], failed + 1
        lines.append("| " + " | ".join([model.like, model.kind, model.stored, *told]) + " |")
        print(lines[-1], flush=True)
    if not only:
        PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
