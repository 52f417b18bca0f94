"""Prompts that are read some tokens at a time: which models can, what is written, and that the tokens stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import llmq
from llmq import demo, job
from llmq.allocation import chunks, memory
from llmq.allocation.chunks import CHUNK, KEY, chunk_of, files, generation_config, goes_on
from llmq.allocation.goal import Fit, Goal
from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from tests.architectures.tiny import config, model, quiet, tokens
from tests.conftest import newer_transformers, write_tiny_model
from tests.llmq.allocation.tasks import ids

# Shared heads; windows; windows and layers that share keys; latent keys; experts; learned positions.
READ = ("llama", "gemma2", "gemma3n_text", "deepseek_v3", "qwen3_moe", "gpt2")
# States of linear attention, alone and beside keys; a cache of another name.
WHOLE = ("qwen3_next", "zamba2", "mamba2")
RECIPE = Recipe(methods=("rtn",), scheme=Scheme(4, 16))


def continued(module: Any, chunk: int | None, length: int = 44) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens after a prompt, and the first logits."""
    given = tokens(1, length)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, KEY: chunk}
    with torch.inference_mode(), quiet():
        found = module.generate(
            given, attention_mask=torch.ones_like(given), output_logits=True, return_dict_in_generate=True, **options
        )
    return found.sequences[0, length:].tolist(), found.logits[0]


@newer_transformers
@pytest.mark.parametrize("kind", READ)
def test_what_goes_on_generates_the_same(kind: str) -> None:
    made = model(kind).eval()
    with quiet():
        assert goes_on(made)
    whole, logits = continued(made, None)
    # Shorter and longer than a window of 16, and all but the last chunk the prompt.
    for chunk in (12, 20, 43):
        found, near = continued(made, chunk)
        assert found == whole
        assert torch.allclose(near, logits, atol=1e-4 * logits.abs().max())


@pytest.mark.parametrize("kind", WHOLE)
def test_states_of_fixed_size_are_read_at_once(kind: str) -> None:
    with quiet(), torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    with quiet():
        assert not goes_on(made)


@newer_transformers
def test_a_model_that_fails_or_prepares_something_else_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("llama")
    assert goes_on(made)
    usual = type(made).prepare_inputs_for_generation

    def cuts(self: Any, given: torch.Tensor, **more: Any) -> Any:
        # As if the given tokens were all, and not those after the cache.
        found = usual(self, given, **more)
        return found | {"input_ids": found["input_ids"][:, -1:]}

    def tells(self: Any, given: torch.Tensor, **more: Any) -> Any:
        # A part of a whole prompt whose tokens see each other.
        found = usual(self, given, **more)
        return found | ({"token_type_ids": torch.ones_like(given)} if given.shape[1] > 2 else {})

    for wrong in (cuts, tells):
        with monkeypatch.context() as patch:
            patch.setattr(type(made), "prepare_inputs_for_generation", wrong)
            assert not goes_on(made)
    monkeypatch.setattr(chunks, "run", lambda *_: 1 / 0)
    assert not goes_on(made)
    # transformers' generate makes no cache for this one.
    assert not goes_on(model("mpt"))


def test_the_demo_reads_in_chunks_and_says_the_same() -> None:
    loaded = llmq.load(demo.path(), device_map="cpu")
    whole = continued(loaded, None, 300)
    for chunk in (64, 256):
        assert continued(loaded, chunk, 300)[0] == whole[0]


@newer_transformers
def test_long_prompts_of_models_of_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = job.plan(str(write_tiny_model(tmp_path / "m")), RECIPE, ids=ids())
    assert chunk_of(plan, CHUNK) is None and chunk_of(plan, CHUNK + 1) == CHUNK
    assert files(plan, None) == {} == files(plan, Fit(1 << 30, CHUNK))
    assert files(plan, Fit(1 << 30, serve="vllm")) == {}
    assert [*files(plan, Fit(1 << 30, serve="cuda"))] == ["generation_config.json"]
    with monkeypatch.context() as patch:
        patch.setitem(plan.source.config, "auto_map", {})
        assert chunk_of(plan, CHUNK + 1) is None
    monkeypatch.setattr(chunks, "in_towers", lambda _: ["vision.proj"])
    assert chunk_of(plan, CHUNK + 1) is None


def test_the_file_keeps_what_the_source_has(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    made = AutoModelForCausalLM.from_pretrained(folder)
    text = generation_config(FolderSource(folder), made, 64)
    assert json.loads(text) == {"eos_token_id": [7, 9], KEY: 64, "temperature": 0.6}
    for wrong in ("{", "[]"):
        path.write_text(wrong)
        with pytest.raises(LlmqError, match=r"generation_config\.json cannot be read"):
            generation_config(FolderSource(folder), made, 64)
    path.unlink()
    # Without the file, transformers takes these from config.json.
    made.config.eos_token_id = 5
    path.write_text(generation_config(FolderSource(folder), made, 64))
    read = GenerationConfig.from_pretrained(folder)
    assert (read.eos_token_id, read.prefill_chunk_size) == (5, 64)


@newer_transformers
def test_a_folder_that_fits_reads_its_prompts_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 16)
    monkeypatch.setattr(memory, "own_share", lambda module: 0)
    source = write_tiny_model(tmp_path / "m")
    lines = memory.fixed_lines(job.plan(str(source), RECIPE, ids=ids()), "cpu", 64)
    assert any(line.what == "activations of a prompt read 16 tokens at a time" for line in lines)
    # Enough for some of the weights' candidates only.
    least = sum(line.nbytes for line in lines)
    goal = Goal(fit=Fit(least + 100_000, 64), candidates=(Scheme(4, 16), Scheme(8, 16), None), prove=False)
    job.quantize(str(source), tmp_path / "out", RECIPE, goal=goal, ids=ids())
    loaded = llmq.load(tmp_path / "out", device_map="cpu")
    assert loaded.generation_config.prefill_chunk_size == 16
    seen: list[int] = []
    loaded.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    with torch.inference_mode():
        loaded.generate(tokens(1, 40), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [16, 16, 8, 1]
