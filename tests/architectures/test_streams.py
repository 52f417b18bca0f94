"""The order in which a block's weights are used, and what their outputs are added to, held against the models' code.

A stream is named by what it is the sum of: the block's input, and the outputs of weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmq.discovery import blocks as discover
from llmq.discovery.addends import see
from llmq.discovery.view import View

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
USUAL = [QKV, (OUT,), GATED, (DOWN,)]
TWO = {OUT: {"input"}, DOWN: {"input", OUT}}

STAGES: dict[str, list[tuple[str, ...]]] = {
    "llama": USUAL,
    "mistral": USUAL,
    "qwen3": USUAL,
    "gemma2": USUAL,
    "gemma3_text": USUAL,
    "olmo2": USUAL,
    "granite": USUAL,
    "cohere2": [(*QKV, *GATED), (OUT,), (DOWN,)],
    "phi3": [("self_attn.qkv_proj",), (OUT,), ("mlp.gate_up_proj",), (DOWN,)],
    "gpt_neox": [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "falcon": [
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    ],
    "opt": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
}
STREAMS: dict[str, dict[str, set[str]]] = {
    "llama": TWO,
    "mistral": TWO,
    "qwen3": TWO,
    "gemma2": {},  # a norm between each output and the stream
    "gemma3_text": {},
    "olmo2": {},
    "granite": TWO,  # outputs are added times a factor
    # Attention and MLP are added together: for attention, which is quantized first, the MLP is not there yet.
    "cohere2": {OUT: {"input"}, DOWN: {"input", OUT}},
    "phi3": TWO,
    "gpt_neox": {"attention.dense": {"input"}, "mlp.dense_4h_to_h": {"input", "attention.dense"}},
    "gpt2": {"attn.c_proj": {"input"}, "mlp.c_proj": {"input", "attn.c_proj"}},
    "falcon": {"self_attention.dense": {"input"}, "mlp.dense_4h_to_h": {"input", "self_attention.dense"}},
    "opt": {"self_attn.out_proj": {"input"}, "fc2": {"input", "self_attn.out_proj"}},
}


@pytest.mark.parametrize("name", STAGES)
def test_finds_what_the_code_does(name: str) -> None:
    model = tiny.model(name).eval()
    block = model.get_submodule(discover.find(model).blocks[1].name)
    matrices = {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    views = [View(f"{n}.weight", transposed=isinstance(m, Conv1D)) for n, m in matrices.items()]
    parts: dict[str, Tensor] = {}

    def entered(_: nn.Module, args: Any, kwargs: Any) -> None:
        parts["input"] = (args[0] if args else kwargs["hidden_states"]).clone()

    def left(key: str) -> Any:
        return lambda _, __, output: parts.update({key: output.clone()})

    hooks = [block.register_forward_pre_hook(entered, with_kwargs=True)]
    hooks += [module.register_forward_hook(left(n)) for n, module in matrices.items()]
    with torch.no_grad():
        seen, _ = see(block, views, lambda: model(tiny.tokens(), use_cache=False))
    for hook in hooks:
        hook.remove()
    found = dict(zip(matrices, seen, strict=True))
    stages: dict[int, list[str]] = {}
    for key, one in sorted(found.items(), key=lambda entry: entry[1].first):
        stages.setdefault(one.inputs[0].untyped_storage().data_ptr(), []).append(key)
    assert [set(stage) for stage in stages.values()] == [set(stage) for stage in STAGES[name]]
    streams = {}
    for key, one in found.items():
        if one.stream is not None:
            streams[key] = summands(one.stream, {n: p for n, p in parts.items() if p.shape[-1] == one.stream.shape[-1]})
    assert streams == STREAMS[name]


def summands(stream: Tensor, parts: dict[str, Tensor]) -> set[str]:
    """What a stream is the sum of, each times some factor; asserts that nothing is left."""
    columns = torch.stack([part.reshape(-1).double() for part in parts.values()], 1)
    wanted = stream.reshape(-1, 1).double()
    factors = torch.linalg.lstsq(columns, wanted).solution
    torch.testing.assert_close(columns @ factors, wanted, rtol=1e-4, atol=1e-5)
    return {name for name, factor in zip(parts, factors[:, 0].tolist(), strict=True) if abs(factor) > 1e-3}
