"""How a base is quantized to NF4 while it is loaded: a tower beside the decoder is not."""

from __future__ import annotations

from pathlib import Path

from llmq.adapters.base import nf4_config
from llmq.checkpoint.source import FolderSource
from tests.llmq.vision import write_llava


def test_a_tower_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    """And the output embedding, as by transformers itself."""
    left = nf4_config(FolderSource(write_llava(tmp_path, tiny_model))).llm_int8_skip_modules
    assert "lm_head" in left and "model.multi_modal_projector.linear_1" in left
    assert len([name for name in left if name.startswith("model.vision_tower.")]) == 12
    assert not [name for name in left if "language_model" in name]


def test_a_causal_model_is_left_to_transformers(tiny_model: Path) -> None:
    assert nf4_config(FolderSource(tiny_model)).llm_int8_skip_modules is None
