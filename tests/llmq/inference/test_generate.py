"""Going on from a prompt: greedy text is what stock transformers generates, drawn text is the seed's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.inference.generate import _rest, generate
from tests.llmq.refusal import refused

PROMPT = "the quick brown"


def test_greedy_text_is_stock_transformers_own(tiny_model: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(ids[0, -8:], skip_special_tokens=True)
    assert generate(tiny_model, PROMPT, 8, stream=False) == expected
    assert generate(tiny_model, PROMPT, 8, stream=False, seed=5) == expected


def test_drawn_text_is_the_seed_s(tiny_model: Path) -> None:
    first, same, other = (generate(tiny_model, PROMPT, 12, temperature=1.5, seed=s, stream=False) for s in (1, 1, 2))
    assert first == same != other


def test_the_text_is_printed_as_it_goes(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(tiny_model, PROMPT, 4)
    assert capsys.readouterr().out.strip() == f"{PROMPT}{text}".strip()
    assert generate(tiny_model, PROMPT, 4, stream=False) == text and capsys.readouterr().out == ""


def test_nothing_to_go_on_from_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    from tests.conftest import write_tokenizer

    write_tokenizer(tmp_path)
    refused(lambda: generate(tmp_path, ""), "the prompt is empty")


def test_only_what_is_as_long_as_the_ids_goes_along() -> None:
    ids = torch.ones(1, 3)
    given = {"input_ids": ids, "attention_mask": torch.ones(1, 3), "length": torch.ones(1)}
    assert list(_rest(given, ids, "cpu")) == ["attention_mask"]
    assert _rest(SimpleNamespace(items=dict.items.__get__({"input_ids": ids})), ids, "cpu") == {}
