"""The numbers that vLLM's are compared with: dequantized weights from memory, in float32, in plain transformers."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from check_stock import kept_in_memory
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from vllm_cases import MIXTURES, Case

import llmq
from llmq import formats
from llmq.discovery.architecture import generator
from llmq.discovery.rename import renamer
from llmq.grids.scheme import Scheme
from llmq.report.report import Report

ROWS, TOKENS = 2, 96
TWIN = "twin"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def write_reference(base: Path, case: Case, out: Path, file: Path) -> bool:
    """Quantize `base` into `out`; write tokens and their log-probabilities to a .npz file.

    Returns whether inputs have static scales. Raises LlmqError where llmq refuses the case.
    """
    kind = generator(AutoConfig.from_pretrained(base))
    model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids = tokens(base, model.config.get_text_config().vocab_size)
    with kept_in_memory() as kept:
        report = llmq.quantize(str(base), out, case.recipe, ids=ids)
    if case.twin:
        write_twin(base, out, report)
    if case.model in MIXTURES:
        np.savez(file, tokens=ids.numpy(), logprob=np.zeros(1), floor=np.zeros(1))
        return False
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected and kept, unexpected
    renamed = renamer(model)

    def module(name: str) -> str:
        """What the model calls a module of the checkpoint."""
        return renamed(f"{name}.weight")[0].removesuffix(".weight")

    scales = {module(name): scale for name, scale in input_scales(out).items()}
    schemes = {module(row.name): row.scheme for row in report.quantized}
    for name, layer in model.named_modules():
        scheme = schemes.get(name)
        if scheme is not None and rounds(scheme):
            layer.register_forward_pre_hook(rounding(scheme, scales.get(name)))
    found = log_probabilities(model, ids)
    # Where inputs are rounded, the dtype alone changes some codes by one; bfloat16 alone is above the limit.
    coarse = case.dtype == "bfloat16" or any(rounds(scheme) for scheme in schemes.values())
    floor = log_probabilities(model.to(getattr(torch, case.dtype)), ids) - found if coarse else torch.zeros(1)
    np.savez(file, tokens=ids.numpy(), logprob=found.numpy(), floor=floor.square().mean().sqrt().numpy())
    return bool(scales)


def write_twin(base: Path, out: Path, report: Report) -> None:
    """Write the source with the dequantized weights of a folder beside it, as TWIN, in float16."""
    stored, written = (
        {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()} for folder in (base, out)
    )
    for row in report.quantized:
        tensors = {n.removeprefix(f"{row.name}."): t for n, t in written.items() if n.startswith(f"{row.name}.")}
        stored[f"{row.name}.weight"] = formats.of(row.scheme).unpack(tensors, row.scheme).dequantize(torch.float32)
    twin = out.parent / TWIN
    twin.mkdir()
    for file in base.glob("*.json"):  # its configuration, tokenizer and processor
        shutil.copy(file, twin)
    save_file({n: t.to(torch.float16).contiguous() for n, t in stored.items()}, twin / "model.safetensors")


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of each token but the first, float32 [rows, tokens − 1]."""
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def tokens(base: Path, vocabulary: int) -> Tensor:
    """Token ids [ROWS, TOKENS] of a text, random ones where there is no tokenizer."""
    if not (base / "tokenizer.json").exists():
        return torch.randint(3, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    ids = AutoTokenizer.from_pretrained(base)(inspect.getsource(inspect), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: ROWS * TOKENS]).view(ROWS, TOKENS)


def input_scales(folder: Path) -> dict[str, Tensor]:
    """The static scales of inputs, by module."""
    found = {}
    for file in folder.glob("*.safetensors"):
        stored = load_file(file)
        found |= {n.removesuffix(".input_scale"): t.float() for n, t in stored.items() if n.endswith(".input_scale")}
    return found


def rounds(scheme: Scheme) -> bool:
    """Whether inputs are rounded on a CPU: where vLLM has no kernel, what takes its place leaves them alone."""
    return scheme.inputs is not None and scheme.inputs.group_size is None and not scheme.inputs.grid


def rounding(scheme: Scheme, static: Tensor | None) -> Callable[[nn.Module, Any], tuple[Tensor]]:
    """A hook that rounds a module's input as vLLM does: per token, the largest magnitude / 127 or 448, in float32."""
    whole = scheme.grid == "int"

    def hook(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        x = given[0].float()
        scale = x.abs().amax(-1, keepdim=True) / (127 if whole else 448) if static is None else static
        units = x / scale
        codes = units.round().clamp(-128, 127) if whole else units.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return ((codes * scale).to(given[0].dtype),)

    return hook
