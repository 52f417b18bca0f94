"""What the tests of adapters share: an adapter of the tiny model, and a model that keeps its weights as [in, out]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llmq.adapters.made import write_adapter


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Of random numbers, on every linear layer of the tiny model; do not change it."""
    return write_adapter(tmp_path_factory.mktemp("adapters") / "plain", tiny_model)


@pytest.fixture(scope="session")
def turned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers keep their weights as [in, out], square ones among them; do not change it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "turned"
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=256, n_positions=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models in bfloat16 of the kinds that adapters are trained on; do not change them."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("bases")
    text: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    tokens = {"image_token_id": 200, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    hybrid = text | linear | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    hybrid |= {"vocab_size": 264}  # transformers' tokenizer for this type adds tokens of its own
    hybrid |= {"rope_parameters": rope | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
    sight = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    sight |= {"num_position_embeddings": 16, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"image_size": 28, "patch_size": 14}
    soft = {"mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252}
    made: dict[str, tuple[Any, Any]] = {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**text, tie_word_embeddings=False)),
        "tied": (hf.LlamaForCausalLM, hf.LlamaConfig(**text, tie_word_embeddings=True)),
        "biased": (hf.LlamaForCausalLM, hf.LlamaConfig(**text, attention_bias=True, tie_word_embeddings=False)),
        "gpt2": (
            hf.GPT2LMHeadModel,
            hf.GPT2Config(
                n_embd=32, n_layer=2, n_head=2, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0
            ),
        ),
        "qwen3_5": (
            hf.Qwen3_5ForConditionalGeneration,
            hf.Qwen3_5Config(text_config=hybrid, vision_config=sight, tie_word_embeddings=False, **tokens),
        ),
        "gemma3": (
            hf.Gemma3ForConditionalGeneration,
            hf.Gemma3Config(text_config=text, vision_config=tower, **soft),
        ),
        "qwen2_vl": (
            hf.Qwen2VLForConditionalGeneration,
            hf.Qwen2VLConfig(
                text_config={k: v for k, v in text.items() if k != "head_dim"}
                | {"rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0},
                vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
                tie_word_embeddings=False,
                **tokens,
            ),
        ),
        "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**text, num_local_experts=4)),
    }
    for name, (kind, config) in made.items():
        torch.manual_seed(0)
        kind(config).to(torch.bfloat16).save_pretrained(folder / name)
    return {name: folder / name for name in made}
