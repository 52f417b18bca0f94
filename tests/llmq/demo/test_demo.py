"""The demo model is a real one: stock transformers loads it, every method applies to it, and it has learned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmq import demo

WINDOWS = 8


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo.path()).eval()


def test_size_on_disk() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names <= {file.name for file in demo.path().iterdir()}
    assert sum((demo.path() / name).stat().st_size for name in names) <= 12 * 2**20


def test_parameters_and_widths(model: PreTrainedModel) -> None:
    assert 3_000_000 <= model.num_parameters() <= 6_000_000
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    widths = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(widths) > 20
    assert all(size % 128 == 0 for pair in widths.values() for size in pair), widths


def test_held_out_modules_are_in_no_other_text() -> None:
    training = dict(demo.documents())
    assert not set(training) & set(demo.EVALUATION_MODULES)
    held_out = demo.evaluation_text()
    for name, text in training.items():
        assert text not in held_out or len(text) < 200, name
    calibration = demo.calibration_text()
    probes = [held_out[start : start + 400] for start in range(0, len(held_out) - 400, 20_000)]
    assert not any(probe in calibration for probe in probes)


def test_texts_are_large_enough_and_repeatable() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    assert len(tokenizer(demo.evaluation_text(), verbose=False).input_ids) > 60_000
    assert len(demo.calibration_text()) > demo.CALIBRATION_CHARACTERS
    assert demo.calibration_text() == demo.calibration_text()
    assert not any("site-packages" in name or name.startswith("test.") for name, _ in demo.documents())


def test_missing_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_library", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="held-out"):
        demo.evaluation_text()


def test_missing_modules_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_library", lambda: tmp_path)
    (tmp_path / "textwrap.py").write_text("held out")
    (tmp_path / "queue.py").write_text("trained on")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_queue.py").write_text("a test")
    assert demo.evaluation_text() == "held out"
    assert [name for name, _ in demo.documents() if not name.startswith("topic:")] == ["queue"]


def test_tokenizer_round_trip() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    text = 'def f(x):\n    """Return  x — naïvely."""\n\treturn x  # 3.14\n'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == AutoModelForCausalLM.from_pretrained(demo.path()).config.eos_token_id
    assert tokenizer.eos_token_id not in ids


@torch.no_grad()
def test_the_model_has_learned(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    window = model.config.max_position_embeddings
    ids = tokenizer(demo.evaluation_text(), return_tensors="pt", verbose=False).input_ids[0, : WINDOWS * window]
    batch = ids.view(WINDOWS, window)
    perplexity = math.exp(float(model(input_ids=batch, labels=batch).loss))
    assert perplexity < 25, "the shipped weights give 12.4 here; an untrained model is at the size of its vocabulary"
