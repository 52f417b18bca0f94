"""What a model keeps of its tokens, against caches of real runs; what lives at once, against sums by hand."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from llmq.allocation import prefill
from llmq.allocation.prefill import prompt
from llmq.errors import LlmqError
from tests.architectures.tiny import config, quiet, tokens

# Shared heads; windows; windows and layers that share keys; latent keys; states of linear attention; both kinds of
# state; experts; a cache of another name.
KINDS = ("llama", "gemma2", "gemma3n_text", "deepseek_v3", "qwen3_next", "zamba2", "qwen3_moe", "mamba2")


def built(kind: str, device: str) -> Any:
    torch.manual_seed(0)
    with quiet(), torch.device(device):
        made = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    return made.eval()


def kept(result: Any) -> int:
    """The bytes of all tensors of a cache, by transformers' own classes."""
    cache = result.get("past_key_values", result.get("cache_params"))
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        values: list[Any] = [*vars(layer).values()]
        while values:
            value = values.pop()
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple, dict)):
                values += value.values() if isinstance(value, dict) else value
    return sum(tensor.nbytes for tensor in {id(t): t for t in found}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_that_of_a_real_run(kind: str) -> None:
    # More tokens than a window of 16.
    for batch, length in ((2, 40), (1, 70)):
        with torch.inference_mode(), quiet():
            real = built(kind, "cpu")(tokens(batch, length), use_cache=True)
        with quiet():
            assert prompt(built(kind, "meta"), length, batch).cache == kept(real)


def test_a_model_on_the_meta_device_with_real_buffers_is_left_as_it_is() -> None:
    model = built("llama", "cpu")
    before = {name: (t.device, t.data_ptr()) for name, t in model.named_buffers()}
    told = prompt(model, 32)
    assert told == prompt(built("llama", "meta"), 32)
    assert {name: (t.device, t.data_ptr()) for name, t in model.named_buffers()} == before


class Watch(TorchDispatchMode):
    """The bytes of all storages alive at once, on the CPU."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.known:
                storage = value.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_what_lives_at_once_is_what_does_in_a_real_run(kind: str) -> None:
    model = built(kind, "cpu")
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    ids = tokens(1, 100)
    with quiet(), torch.inference_mode(), Watch(known) as watch:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    told = prompt(model, 100)
    assert told.cache <= told.heap <= told.peak
    assert told.peak == pytest.approx(watch.peak, rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_in_chunks_less_lives_at_once(kind: str) -> None:
    model = built(kind, "cpu")
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    given, cache = tokens(1, 203), None
    with quiet(), torch.inference_mode(), Watch(known) as watch:
        # The last of the prompt is shorter than a chunk; the prediction takes a whole one.
        for ids in torch.split(given, 50, dim=-1):
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1, past_key_values=cache).past_key_values
    told = prompt(model, 203, chunk=50)
    assert told.cache <= told.heap <= told.peak < 0.75 * prompt(model, 203).peak
    # Fused attention makes the mask of numbers within an operator.
    assert 0.97 * watch.peak < told.peak < 1.03 * watch.peak + 4 * 50 * 203


def test_of_many_chunks_the_last_two_are_run() -> None:
    assert [prefill._steps(n, 512) for n in (512, 513, 1024, 1025, 1 << 20)] == [
        [512],
        [1, 512],
        [512, 512],
        [1, 512, 512],
        [(1 << 20) - 1024, 512, 512],
    ]
    assert prefill._steps(4096, None) == [4096]


def test_attention_does_not_grow_with_the_square_of_the_length() -> None:
    model = built("llama", "meta")
    short, long = (prompt(model, n).peak for n in (1 << 12, 1 << 15))
    assert long < 8.1 * short


def test_large_blocks_are_not_on_the_heap() -> None:
    told = prompt(built("llama", "meta"), 1 << 20)
    assert told.heap < told.cache < told.peak


def test_a_model_that_asks_for_values_is_run_on_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama", "meta")
    exact = prompt(model, 1000, 3)

    def refuses(*_: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(prefill, "_traced", refuses)
    told = prompt(model, 1000, 3)
    assert told.cache == exact.cache and told.peak >= exact.peak
    monkeypatch.setattr(prefill, "run", refuses)
    with pytest.raises(LlmqError, match=r"--target-size or --target-bits instead") as refused:
        prompt(model, 1000)
    assert "item()" in str(refused.value)
