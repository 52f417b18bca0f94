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
from llmq_kernels.grouped_int_linear.route import Routing, sort, unsorted

NAME = "llmq"
"""The name of `grouped` among transformers' implementations of experts."""


def use_packed(experts: nn.Module) -> None:
    """Let an experts' module whose stacks are packed run on `grouped`, if its class lets transformers choose."""
    config = getattr(experts, "config", None)
    if hasattr(type(experts).forward, "__wrapped__") and hasattr(experts, "has_gate") and config is not None:
        experts._llmq_stacks = _orders(experts)  # type: ignore[assignment]
        config._experts_implementation = NAME


def _orders(experts: nn.Module) -> list[tuple[str, str]]:
    """The names of the stacks that may come first and second in an expert, by their sizes.

    The first multiplies the rows, and gives the inputs of the second, twice as many if it is gated. Without gates both
    orders fit, until the width of the rows is known.
    """
    stacks = {name: child for name, child in experts.named_children() if isinstance(child, PackedStack)}
    others = [p for p in experts.parameters(recurse=False) if p.dim() >= 3]
    if len(stacks) != 2 or others or not all(stack.routes() for stack in stacks.values()):
        return []
    found = []
    for first, second in (tuple(stacks), tuple(stacks)[::-1]):
        (out, width), (back, inner) = stacks[first].sizes(), stacks[second].sizes()
        if out == inner * (2 if experts.has_gate else 1) and back == width:
            found.append((first, second))
    return found


def grouped(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An implementation of transformers' experts, by its protocol: rows [T, H], choices and weights [T, k] → [T, H].

    Experts that are not packed, or not so that one operator multiplies them, run as without it.
    """
    orders = getattr(experts, "_llmq_stacks", [])
    fitting = [order for order in orders if getattr(experts, order[0]).sizes()[1] == hidden_states.shape[-1]]
    if len(fitting) != 1:
        packed = any(isinstance(child, PackedStack) for child in experts.children())
        way = type(experts).forward.__wrapped__ if packed else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return cast(Tensor, way(experts, hidden_states, top_k_index, top_k_weights))
    names = fitting[0]
    first, second = (getattr(experts, name) for name in names)
    biases = [getattr(experts, f"{name}_bias") if experts.has_bias else None for name in names]
    tokens, choices = top_k_index.shape
    if unsorted(tokens, choices, len(first)):
        x, order, routings = (
            hidden_states,
            None,
            (Routing(chosen=top_k_index), Routing(chosen=top_k_index.reshape(-1, 1))),
        )
        weights = top_k_weights.reshape(-1)
    else:
        order, offsets = sort(top_k_index, len(first))
        x, routings = hidden_states[order // choices], (Routing(offsets),) * 2
        weights = top_k_weights.reshape(-1)[order]
    inner = first.routed_product(x, routings[0], biases[0])
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = second.routed_product(inner, routings[1], biases[1])
    if getattr(experts, "has_post_expert_norm", False):  # older transformers have none
        outer = experts.post_expert_norm(outer)
    outer = outer * weights.unsqueeze(-1)
    if order is not None:
        outer = outer[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]
    return cast(Tensor, outer.view(*top_k_index.shape, outer.shape[-1]).sum(1).to(hidden_states.dtype))


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped)
