"""What the tests of adapters share: an adapter of the tiny model, and a model that keeps its weights as [in, out]."""

from __future__ import annotations

from pathlib import Path

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
