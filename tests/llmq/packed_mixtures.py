"""Folders of mixtures whose weights are packed one by one, experts too, and the dense models that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.architectures import tiny
from tests.llmq.written import Case, Tensors, awq, compressed, config, gptq, save

Renamed = Callable[[str], str]


def stored(model_type: str, folder: Path) -> Tensors:
    """The tensors of a tiny model, under its checkpoints' names."""
    tiny.make(model_type, folder)
    return {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def quantized(name: str, tensor: torch.Tensor) -> bool:
    """Matrices of blocks, but for routers and tiny ones."""
    usual = re.search(r"proj\.weight$|\.w[123]\.weight$|fc[123]\.weight$", name) is not None
    return usual and tensor.dim() == 2 and min(tensor.shape) >= 32 and ".layers." in name


def mixture(folder: Path, model_type: str, case: Case, renamed: Renamed = str, only: str = "") -> Any:
    """A folder, and the dense model in float32 that it stands for, as transformers loads that.

    renamed: of the packed weights' names; only: quantize weights whose names have this.
    """
    state = stored(model_type, folder / "dense")
    rng = np.random.default_rng(case.bits)
    maker: Callable[..., tuple[Tensors, np.ndarray]] = {"gptq": gptq, "gptq_v2": gptq, "awq": awq}.get(
        case.kind, compressed
    )
    packed: Tensors = {}
    for name, tensor in state.items():
        if not quantized(name, tensor) or only not in name:
            packed[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        made, weight = maker(rng, *tensor.shape, case)
        packed |= {f"{renamed(stem)}.{suffix}": value for suffix, value in made.items()}
        state[name] = torch.from_numpy(weight.astype(np.float32))
    save(folder / "dense", state)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    values = json.loads((folder / "dense" / "config.json").read_text()) | {"quantization_config": config(case)}
    if case.kind.startswith("ct"):
        ignored = [
            name.removesuffix(".weight")
            for name, value in packed.items()
            if value.dim() == 2 and value is state.get(name)
        ]
        values["quantization_config"]["ignore"] = ignored
    (folder / "packed").mkdir()
    (folder / "packed" / "config.json").write_text(json.dumps(values))
    save(folder / "packed", packed, shards=2)
    return dense
