"""Packed experts as one of transformers' implementations of experts: one operator for all experts of a stack.

A class of experts whose implementation can be chosen calls the registered function by a protocol of transformers; the
names of that protocol are in this file only. Other classes run their own code on the packed stacks (`stack`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llmq.inference.stack import PackedStack

NAME = "llmq"
"""The name of `grouped` among transformers' implementations of experts."""


def use_packed(experts: nn.Module) -> None:
    """Let an experts' module whose stacks are packed run on `grouped`, if its class lets transformers choose."""
    config = getattr(experts, "config", None)
    if hasattr(type(experts).forward, "__wrapped__") and hasattr(experts, "has_gate") and config is not None:
        experts._llmq_stacks = _in_order(experts)  # type: ignore[assignment]
        config._experts_implementation = NAME


def _in_order(experts: nn.Module) -> tuple[str, str] | None:
    """The names of the stacks that come first and second in an expert, told by their sizes; None if they do not tell.

    The first multiplies the rows, and gives the inputs of the second, twice as many if it is gated.
    """
    stacks = {name: child for name, child in experts.named_children() if isinstance(child, PackedStack)}
    others = [p for p in experts.parameters(recurse=False) if p.dim() >= 3]
    if len(stacks) != 2 or others or not all(stack.groups() for stack in stacks.values()):
        return None
    found = []
    for first, second in (tuple(stacks), tuple(stacks)[::-1]):
        (out, width), (back, inner) = stacks[first].sizes(), stacks[second].sizes()
        if out == inner * (2 if experts.has_gate else 1) and back == width:
            found.append((first, second))
    return found[0] if len(found) == 1 else None


def grouped(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An implementation of transformers' experts, by its protocol: rows [T, H], choices and weights [T, k] → [T, H].

    Experts that are not packed, or not so that one operator multiplies them, run as without it.
    """
    names = getattr(experts, "_llmq_stacks", None)
    if names is None:
        packed = any(isinstance(child, PackedStack) for child in experts.children())
        way = type(experts).forward.__wrapped__ if packed else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return cast(Tensor, way(experts, hidden_states, top_k_index, top_k_weights))
    first, second = (getattr(experts, name) for name in names)
    biases = [getattr(experts, f"{name}_bias") if experts.has_bias else None for name in names]
    chosen = top_k_index.size(-1)
    numbers, order = torch.sort(top_k_index.reshape(-1))
    every = torch.arange(len(first), device=numbers.device, dtype=numbers.dtype)
    offsets = torch.searchsorted(numbers, every, right=True)
    inner = first.sorted_product(hidden_states[order // chosen], offsets, biases[0])
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = second.sorted_product(inner, offsets, biases[1])
    if getattr(experts, "has_post_expert_norm", False):  # older transformers have none
        outer = experts.post_expert_norm(outer)
    outer = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return cast(Tensor, outer[back].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype))


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped)
