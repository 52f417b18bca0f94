"""Plan, GPTQ, stock loading, logits: on types chosen for variety. scripts/sweep_architectures.py does it for all."""

from __future__ import annotations

from pathlib import Path

import checks
import pytest
import tiny

from llmq import job
from llmq.errors import LlmqError

TYPES = [
    "bart",  # weights of an attention that never runs stay as they are
    "bloom",
    "cohere2",  # masks per layer, attention and MLP in parallel, a tied head
    "falcon_h1",  # a state-space model and attention side by side
    "gemma3n_text",  # four hidden streams; keys and values of other layers
    "gpt_bigcode",  # some weights that stock transformers cannot load packed
    "mamba",  # weights used without calling their module
    "phi3",  # query, key and value in one weight
    "qwen3_5_text",  # linear and full attention in turn
    "xlnet",  # two streams, weights as bare 3-D parameters
    "zamba2",  # low-rank adapters, blocks of two kinds
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_stock_transformers_gives_the_logits_of_the_weights_in_memory(name: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source")
    done = checks.quantized(source, tmp_path / "out", tiny.tokens(4, 32, seed=2), tiny.tokens())
    assert done.error <= 1e-3
    assert 1e-3 < done.moved < 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "nothing to quantize: it is not the weight of a Linear module"),
        ("falcon", "nothing to quantize: stock transformers cannot load it packed"),
        ("mixtral", "mixture-of-experts models are not supported yet"),
    ],
)
def test_refused_before_any_work(name: str, words: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "source")
    with pytest.raises(LlmqError, match=words):
        job.plan(str(source), out=tmp_path / "out", ids=tiny.tokens(4, 32))
    assert not (tmp_path / "out").exists()
