"""Tiny random models that do not generate text from text alone: the class that opens each, and an input of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SMALL | {"vocab_size": 256, "max_position_embeddings": 64}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4} | SPECIAL
HALVES = {f"{half}_{part}": n for half in ("encoder", "decoder") for part, n in (("layers", 2), ("ffn_dim", 128))}
HALVES |= {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
BART = HALVES | SPECIAL | {"vocab_size": 256, "d_model": 64, "max_position_embeddings": 64}
WHISPER = HALVES | SPECIAL | {"vocab_size": 256, "d_model": 64, "num_mel_bins": 16, "max_source_positions": 20}
WHISPER |= {"max_target_positions": 32, "suppress_tokens": None, "begin_suppress_tokens": None}
MODERN = (
    TEXT | {name: n for name, n in SPECIAL.items() if "decoder" not in name} | {"cls_token_id": 1, "sep_token_id": 2}
)
MOBILE = TEXT | {"embedding_size": 32, "intra_bottleneck_size": 32}
SPEECH = SMALL | {"vocab_size": 32, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}


class Kind(NamedTuple):
    """model: its class; config: its class and arguments; opener: the class given with --class."""

    model: str
    config: str
    sizes: dict[str, Any]
    opener: str
    inputs: Callable[[], dict[str, Tensor]]


def text(length: int = 12) -> Tensor:
    return torch.randint(3, 250, (2, length), generator=torch.Generator().manual_seed(length))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def ids() -> dict[str, Tensor]:
    return {"input_ids": text()}


def pair() -> dict[str, Tensor]:
    return {"input_ids": text(), "decoder_input_ids": text(5)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 32, 32)}


def sound() -> dict[str, Tensor]:
    return {"input_features": noise(2, 16, 40), "decoder_input_ids": text(5)}


BOTH = {"text_config": TEXT, "vision_config": VISION}
KINDS = {
    "bert": Kind("BertModel", "BertConfig", TEXT, "AutoModel", ids),
    "bert-masked": Kind("BertForMaskedLM", "BertConfig", TEXT, "AutoModelForMaskedLM", ids),
    "bert-labels": Kind("BertForSequenceClassification", "BertConfig", TEXT, "AutoModelForSequenceClassification", ids),
    "mobilebert": Kind("MobileBertForMaskedLM", "MobileBertConfig", MOBILE, "AutoModelForMaskedLM", ids),
    "modernbert": Kind("ModernBertModel", "ModernBertConfig", MODERN, "AutoModel", ids),
    "t5": Kind("T5ForConditionalGeneration", "T5Config", T5, "AutoModelForSeq2SeqLM", pair),
    "t5-gated": Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu"},
        "AutoModelForSeq2SeqLM",
        pair,
    ),
    "t5-encoder": Kind("T5EncoderModel", "T5Config", T5, "T5EncoderModel", ids),
    "bart": Kind("BartForConditionalGeneration", "BartConfig", BART, "AutoModelForSeq2SeqLM", pair),
    "bart-untied": Kind(
        "BartForConditionalGeneration",
        "BartConfig",
        BART | {"tie_word_embeddings": False},
        "AutoModelForSeq2SeqLM",
        pair,
    ),
    "marian": Kind("MarianMTModel", "MarianConfig", BART, "AutoModelForSeq2SeqLM", pair),
    "whisper": Kind("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "AutoModelForSpeechSeq2Seq", sound),
    "clip": Kind("CLIPModel", "CLIPConfig", BOTH, "AutoModel", lambda: ids() | image()),
    "siglip": Kind("SiglipModel", "SiglipConfig", BOTH, "AutoModel", lambda: ids() | image()),
    "vit": Kind("ViTForImageClassification", "ViTConfig", VISION, "AutoModelForImageClassification", image),
    "dinov2": Kind("Dinov2Model", "Dinov2Config", VISION, "AutoModel", image),
    "speech": Kind(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, "AutoModelForCTC", lambda: {"input_values": noise(2, 400)}
    ),
}


def write(name: str, folder: Path) -> Path:
    """Write one of KINDS, with weights large enough that their rounding shows."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind.model)(getattr(transformers, kind.config)(**kind.sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Every floating-point tensor that a model returns."""

    def flat(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        value = value.to_tuple() if hasattr(value, "to_tuple") else value
        return [one for part in value for one in flat(part)] if isinstance(value, (tuple, list)) else []

    with torch.no_grad():
        return [one for one in flat(model(**inputs)) if one.is_floating_point()]
