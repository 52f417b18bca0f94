"""Reading a prompt some tokens at a time, so that only their activations live at once.

transformers' `generate` does so where `generation_config.json` has `prefill_chunk_size`. Whether a model's code can go
on from what it keeps is found by running it without its numbers: each tensor that it keeps has to grow with every
token. A state of fixed size may start anew with every run of several tokens, which no shape tells.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.allocation.goal import Fit
from llmq.allocation.prefill import CACHE, Fused, as_loaded, kept, on_meta, run
from llmq.checkpoint.files import GENERATION
from llmq.checkpoint.source import Source
from llmq.discovery.architecture import in_towers
from llmq.discovery.dry import without_arithmetic
from llmq.discovery.parameters import shared_zeros
from llmq.errors import LlmqError, first_line
from llmq.planning.types import Plan

CHUNK = 512
"""Tokens: fewer save little more memory, and unpack the weights more often."""
KEY = "prefill_chunk_size"
FEW = 2
_known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def chunk_of(plan: Plan, context: int) -> int | None:
    """The tokens that a prompt of this model is read at a time; None where it is read at once.

    Images cannot be cut, so a model with towers reads its prompt at once, and so does one whose folder has code of its
    own.
    """
    opened = plan.model if plan.named is None else plan.named.model
    if context <= CHUNK or in_towers(opened) or "auto_map" in plan.source.config:
        return None
    if plan.model not in _known:
        _known[plan.model] = goes_on(plan.model)
    return CHUNK if _known[plan.model] else None


def goes_on(model: nn.Module) -> bool:
    """Whether a model reads tokens after those that it has read, keeps what it would if all were read at once, and
    transformers' `generate` hands them to it so.
    """
    try:
        return _keeps_the_same(on_meta(model)) and _is_generated(as_loaded(model))
    except Exception:  # a model's code may fail in any way
        return False


def _keeps_the_same(model: nn.Module) -> bool:
    """model: on the meta device."""
    ids = torch.zeros(1, 2 * FEW, dtype=torch.long, device="meta")
    with torch.inference_mode(), Fused():
        result = run(model, ids[:, :FEW])
        few, all_of_them = _shapes(result), _shapes(run(model, ids))
        if not few or [2 * shape.numel() for shape in few] != [shape.numel() for shape in all_of_them]:
            return False
        return _shapes(run(model, ids[:, FEW:], result[CACHE])) == all_of_them


def _is_generated(model: Any) -> bool:
    """Whether `generate` cuts a prompt, and tells the model as much as of a whole one: what it says of all of a prompt,
    such as a part whose tokens see each other, would be cut, too.

    After a cache of an earlier call, transformers before some version reads all tokens again where it cuts them.
    """
    told: list[tuple[int, set[str]]] = []

    def see(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        told.append((given["input_ids"].shape[1], {name for name, value in given.items() if isinstance(value, Tensor)}))

    model.register_forward_pre_hook(see, with_kwargs=True)
    ids = torch.zeros(1, 5 * FEW, dtype=torch.long)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with Fused(), shared_zeros(model), without_arithmetic():
        model.generate(ids, **options)
        first = model.generate(ids[:, : 3 * FEW], **options, **{KEY: FEW})
        model.generate(ids, **options, **{KEY: FEW, CACHE: first[CACHE]})
    return [count for count, _ in told] == [5 * FEW] + [FEW] * 5 and all(names == told[0][1] for _, names in told)


def files(plan: Plan, fit: Fit | None) -> dict[str, str]:
    """The files of a folder that is written to fit: its name → text of generation_config.json, where prompts are read
    some tokens at a time. Raises LlmqError.
    """
    chunk = None if fit is None or fit.serve == "vllm" else chunk_of(plan, fit.context)
    return {} if chunk is None else {GENERATION: generation_config(plan.source, plan.model, chunk)}


def generation_config(source: Source, model: nn.Module, chunk: int) -> str:
    """The folder's generation_config.json, with the tokens that are read at a time. Raises LlmqError."""
    from transformers import GenerationConfig

    path = source.aux_files().get(GENERATION)
    try:
        if path is None:
            # Without this file, transformers takes some values from config.json, as it does here.
            found = GenerationConfig.from_model_config(model.config).to_diff_dict()  # type: ignore[arg-type]
            values = {key: value for key, value in found.items() if not key.startswith("_")}
        else:
            values = json.loads(path.read_text(encoding="utf-8"))
        return json.dumps({**values, KEY: chunk}, indent=2, sort_keys=True) + "\n"
    except (OSError, ValueError, TypeError) as error:
        raise LlmqError(f"{path or source.folder} cannot be read: {first_line(error)}: download it again") from error


def _shapes(result: Mapping[Any, Any]) -> list[torch.Size]:
    return [tensor.shape for tensor in kept(result) if tensor.is_floating_point()]
