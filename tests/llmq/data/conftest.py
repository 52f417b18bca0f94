"""What the tests of data share: a tokenizer with merges, an end token and a chat template, and one without."""

from __future__ import annotations

from typing import Any

import pytest

from tests.llmq.data.made import TEMPLATE, text


@pytest.fixture(scope="session")
def bpe() -> Any:
    """A byte-level BPE with merges, an end-of-text token, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text(2000)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def plain(bpe: Any) -> Any:
    """The same without an end-of-text token and a template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
