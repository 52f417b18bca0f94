"""A folder in few bits as a dense model in memory, where stock transformers does not read it, or not rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.checkpoint.source import Source
from llmq.discovery.blocks import build
from llmq.discovery.named import build_named
from llmq.errors import LlmqError
from llmq.formats.dequantized import Dequantized, open_source, reads
from llmq.formats.fp8 import few_bits, rounds_inputs
from llmq.formats.inspection import section_of


class Unread:
    """A tensor that transformers reads when it places it, as it does the slices of a file."""

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name

    def __getitem__(self, _: Any) -> Tensor:
        return self.source.read(self.name)


def dense_source(
    folder: Path, trust_remote_code: bool = False, *, always: bool = False, kernels: bool = False, kind: Any = "auto"
) -> Dequantized | None:
    """The folder, dequantized when read, if stock transformers would not give the same values; else None. Nor if it
    rounds inputs, and each weight is that of a linear layer: then stock transformers is right.

    always: also if stock transformers would, or runs the codes as they are; None if the folder has none. kernels: not
    if llmq's kernels run its weights packed. kind: the dtype that was asked for.

    Raises LlmqError if a weight's codes, scales and configuration contradict each other.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    method, section = section_of(folder, config if isinstance(config, dict) else {})
    if not always and formats.read_by_stock(method, section):
        return None
    if kernels and not always and formats.packed_for_kernels(method, section):
        return None
    if not reads(folder, config):
        return None
    source = open_source(folder, trust_remote_code)
    if not isinstance(source, Dequantized):
        return None
    if not always and rounds_inputs(method, section) and _in_layers(source, trust_remote_code):
        if kind not in ("auto", torch.bfloat16) and few_bits(section):
            raise LlmqError(
                f"{folder} rounds inputs beside weights of fewer than 8 bits, which stock transformers computes in "
                "bfloat16 only: use --dtype bfloat16"
            )
        return None
    return source


def _in_layers(source: Dequantized, trust_remote_code: bool) -> bool:
    """Whether every weight that was quantized is the weight of a linear layer, by its name; experts are none."""
    model = build(source.folder, source.dtype, trust_remote_code)
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return layers.issuperset(source.coded)


def load_dense(
    source: Dequantized,
    dtype: torch.dtype | str,
    device: Any,
    generates: bool = True,
    spilled: str | None = None,
    quantization: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """The model of a source, and what transformers says of its tensors; each is dequantized when it is placed.

    dtype: 'auto' is that of the source; generates: open the part that generates text, else the class that config.json
    names; spilled: the folder for the parts that stay on disk; quantization: transformers' own config, to quantize what
    was dequantized. Raises what from_pretrained raises.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    whole = None if generates else build_named(source.folder, source.dtype, source.trust_remote_code)
    kind: Any = type(whole or build(source.folder, source.dtype, source.trust_remote_code))
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model, told = kind.from_pretrained(
        None,
        config=config,
        state_dict={name: Unread(source, name) for name in source.names()},
        dtype=source.dtype if dtype == "auto" else dtype,
        device_map=device,
        output_loading_info=True,
        offload_folder=spilled,
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    model.config.name_or_path = str(source.folder)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model, told
