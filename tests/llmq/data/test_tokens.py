"""A long text to tokens: in pieces as in one call, by every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.data import tokens
from llmq.data.tokens import encode, tokenize
from tests.llmq.data.made import text

SHARED = Path(__file__).parents[4] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside this checkout")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["books8m", "stories260K"])
@needs_shared
def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, special: bool) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(tokens, "PIECE", 2000)
    monkeypatch.setattr(tokens, "OVERLAP", 600)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    sample = (SHARED / "data" / "books" / "heldout.txt").read_text(encoding="utf-8")[:100_000]
    ids = tokenize(sample, tokenizer, special_tokens=special)
    assert ids.tolist() == tokenizer(sample, add_special_tokens=special)["input_ids"]


def test_pieces_equal_the_whole_with_many_bytes_a_character(monkeypatch: pytest.MonkeyPatch, bpe: Any) -> None:
    monkeypatch.setattr(tokens, "PIECE", 500)
    monkeypatch.setattr(tokens, "OVERLAP", 200)
    for sample in (text(3000), "\U0001f41d" * 3000, "ab" * 2000, " \n" * 1500):
        assert tokenize(sample, bpe).tolist() == bpe(sample, add_special_tokens=False)["input_ids"]


class Counting:
    """A tokenizer that notes the texts of each call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, list[Any]()
        self.is_fast = tokenizer.is_fast

    def __call__(self, text: Any, **options: Any) -> Any:
        self.calls.append(text)
        return self.tokenizer(text, **options)


def test_no_call_is_given_more_than_a_few_pieces(monkeypatch: pytest.MonkeyPatch, bpe: Any) -> None:
    """That is what saves the memory of one call on the whole text."""
    monkeypatch.setattr(tokens, "PIECE", 500)
    monkeypatch.setattr(tokens, "OVERLAP", 200)
    counting, sample = Counting(bpe), text(3000)
    assert tokenize(sample, counting).tolist() == bpe(sample)["input_ids"]
    assert len(counting.calls) > 3
    assert all(len(call) <= tokens.BATCH and max(map(len, call)) <= 700 for call in counting.calls)


def test_a_short_text_and_a_slow_tokenizer_take_one_call(monkeypatch: pytest.MonkeyPatch, bpe: Any) -> None:
    sample = text(1000)
    counting = Counting(bpe)
    assert tokenize(sample, counting).dtype == torch.int64 and counting.calls == [sample]
    monkeypatch.setattr(tokens, "PIECE", 500)
    monkeypatch.setattr(tokens, "OVERLAP", 200)
    slow = Counting(bpe)
    slow.is_fast = False
    assert tokenize(sample, slow).tolist() == encode(sample, bpe) and slow.calls == [sample]


def test_pieces_that_never_agree_go_through_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that takes a whole text for one token: no two pieces have a token in common."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(tokens, "PIECE", 50)
    monkeypatch.setattr(tokens, "OVERLAP", 20)
    whole = Tokenizer(models.WordLevel({"<unknown>": 0, "x" * 200: 1}, unk_token="<unknown>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unknown>")
    counting = Counting(tokenizer)
    assert tokenize("x" * 200, counting).tolist() == [1]
    assert counting.calls[-1] == "x" * 200 and len(counting.calls) == 2


def with_ends(bpe: Any) -> Any:
    """The tokenizer, with a token before and after each text by itself."""
    import copy

    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = copy.deepcopy(bpe.backend_tokenizer)
    end = inner.token_to_id("<end>")
    inner.post_processor = TemplateProcessing("<end> $A <end> <end>", special_tokens=[("<end>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_are_added_once(monkeypatch: pytest.MonkeyPatch, bpe: Any, special: bool) -> None:
    monkeypatch.setattr(tokens, "PIECE", 500)
    monkeypatch.setattr(tokens, "OVERLAP", 200)
    tokenizer, sample = with_ends(bpe), text(2000)
    ids = tokenize(sample, tokenizer, special_tokens=special).tolist()
    assert ids == tokenizer(sample, add_special_tokens=special)["input_ids"]
    assert ids.count(bpe.eos_token_id) == (3 if special else 0)
    assert encode("see", tokenizer, special_tokens=special) == tokenizer("see", add_special_tokens=special)["input_ids"]
