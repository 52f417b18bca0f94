"""What a decode step begins with, against real runs; and that steps and their parts are those of the model."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmq.allocation.latency import decode
from llmq.allocation.latency.decode import start, timed
from llmq.allocation.prefill import tensors_in
from llmq.errors import LlmqError
from tests.architectures.tiny import config, quiet, tokens
from tests.llmq.allocation.tasks import CPU

# Shared heads; windows; latent keys; linear attention; another name for the cache.
KINDS = ("llama", "gemma2", "deepseek_v3", "qwen3_next", "mamba2")


def built(kind: str) -> Any:
    torch.manual_seed(0)
    with quiet():
        return AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32).eval()


def sizes(cache: dict[str, Any]) -> list[tuple[int, ...]]:
    return sorted(tuple(t.shape) for t in tensors_in([*cache.values()]) if t.is_floating_point() and t.dim() > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_that_of_a_prompt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The dry run reads it in parts.
    monkeypatch.setattr(decode, "CHUNK", 16)
    model = built(kind)
    ids = tokens(2, 40)
    with torch.inference_mode(), quiet():
        real = model(input_ids=ids, use_cache=True)
    begin = start(model, 40, 2)
    assert (begin.tokens, begin.batch) == (40, 2)
    expected = {name: real[name] for name in begin.kept}
    assert sizes(begin.kept) == sizes(expected)
    one, other = begin.cache(CPU), begin.cache(CPU)
    assert sizes(one) == sizes(expected) and sum(t.nbytes for t in tensors_in([*one.values()])) == begin.nbytes
    mine = {t.untyped_storage().data_ptr() for t in tensors_in([*one.values()]) if t.numel()}
    assert not mine & {t.untyped_storage().data_ptr() for t in tensors_in([*other.values()]) if t.numel()}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_parts(kind: str) -> None:
    model = built(kind)
    begin = start(model, 24, 1)
    parts = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    times = timed(model, parts, begin, CPU)
    assert set(times.parts) == set(parts) and any(value > 0 for value in times.parts.values())
    assert 0 < sum(times.parts.values()) < times.step


class Slow(nn.Module):
    """Returns a cache, and lets the clock go on by a second in its part."""

    def __init__(self, clock: list[float], kept: Any) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.part.forward = lambda: clock.__setitem__(0, clock[0] + 1.0)  # type: ignore[method-assign]
        self.clock, self.kept = clock, kept

    def forward(self, input_ids: Any, use_cache: bool, past_key_values: Any = None) -> Any:
        self.part()
        self.part()
        self.clock[0] += 3.0
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4), past_key_values=self.kept)


def test_times_are_sums_over_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    model = Slow(clock, [torch.zeros(2)])
    times = timed(model, ["part"], start(model, 4, 1), CPU)
    assert times.step == 5000 and times.parts == {"part": 2000}
    assert time.perf_counter() > 0


def test_what_does_not_decode_is_refused() -> None:
    forgets = Slow([0.0], None)
    with pytest.raises(LlmqError, match="keeps no cache between tokens"):
        start(forgets, 4, 1)
    fails = built("llama")
    fails.model.forward = lambda **_: 1 / 0
    with pytest.raises(LlmqError, match=r"does not decode.*division by zero"):
        start(fails, 4, 1)


def test_rows_of_a_batch_choose_different_experts() -> None:
    model = built("qwen3_moe")
    seen: list[torch.Tensor] = []
    experts = next(one for one in model.modules() if type(one).__name__.endswith("Experts"))
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    timed(model, [], start(model, 16, 8), CPU)
    steps = [choices for choices in seen if len(choices) == 8]
    assert any(len({tuple(row) for row in choices.tolist()}) > 1 for choices in steps)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
@pytest.mark.parametrize("more", [0, 50])
def test_more_tokens_than_a_model_reads_are_refused_in_words(kind: str, more: int) -> None:
    model = built(kind)
    context = model.config.max_position_embeddings + more
    with pytest.raises(LlmqError, match="give a shorter --context"):
        timed(model, [], start(model, context, 1), CPU)
