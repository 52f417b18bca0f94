"""The frozen base of an adapter: how it is quantized to NF4 while it is loaded."""

from __future__ import annotations

from typing import Any

import torch

from llmq.checkpoint.source import Source
from llmq.discovery.architecture import beside_decoder
from llmq.discovery.blocks import build


def nf4_config(source: Source) -> Any:
    """transformers' BitsAndBytesConfig that quantizes the decoder's linear layers to NF4, with quantized scales.

    Towers beside the decoder stay as they are: rows are text alone, so no adapter would make up for their rounding.
    Raises LlmqError if the model cannot be built.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    model = build(source.folder, torch.bfloat16, source.trust_remote_code)
    beside = beside_decoder(model)
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # A list takes the place of transformers' own.
        llm_int8_skip_modules=sorted({*get_keys_to_not_convert(model), *beside}) if beside else None,
    )
