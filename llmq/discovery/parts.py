"""A block's routed experts that cannot be run one at a time: each is a part of parameters, used while the block runs.

Which part is an expert's matrix is found from the products that were observed, never from names: each of them used an
entry of a parameter [experts, ...], several entries at once, or, in a parameter of two axes, one of equal ranges of
rows. Entries that no product was observed with are taken to be used like the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.discovery.experts import Places, Routed, Stack
from llmq.discovery.matmuls import Matmul, watch_matmuls
from llmq.discovery.routers import follow_products

FIRST = 2  # experts that are called to see which products they are


@dataclass(frozen=True)
class PartsInfo:
    """Parameters of a module whose entries are the matrices of experts.

    module: its path in the block; count: the largest number of entries; stacks: by name within the module, their
    input_id is the same for those of all modules of the block that are fed by the same tensor; copies: with how many
    rows per token the experts' products are computed at most.
    """

    module: str
    count: int
    stacks: dict[str, Stack]
    copies: int

    @property
    def names(self) -> list[str]:
        """The parameters by their names in the block."""
        return [f"{self.module}.{name}" for name in self.stacks]


def linears_of(block: nn.Module) -> dict[str, str]:
    """The weights of a block's Linear modules: parameter → module."""
    return {f"{n}.weight" if n else "weight": n for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def find_routed(
    block: nn.Module, matmuls: list[Matmul], hidden: Tensor, but: list[str], shared: bool = False
) -> list[str]:
    """The parameters of a block that hold experts, or may do so, but for some.

    shared: whether the routed experts are among those, so that a stack that all tokens go through holds none.
    """
    if not any(m.chosen for m in matmuls):
        return []
    tokens, linears, found = hidden.shape[:-1].numel(), linears_of(block), []
    for parameter, value in block.named_parameters():
        uses = [m for m in matmuls if m.parameter == parameter]
        listed = any(isinstance(block.get_submodule(p), nn.ModuleList) for p in _ancestors(parameter))
        if value.dim() < 2 or parameter in but or not _is_routed(value, uses, tokens, listed and parameter in linears):
            continue
        if not (shared and value.dim() > 2 and all(u.tokens == tokens * len(value) for u in uses)):
            found.append(parameter)
    return found


def _is_routed(value: Tensor, uses: list[Matmul], tokens: int, listed: bool) -> bool:
    """Whether a parameter of a block that routes tokens holds experts: a stack of them, or one of a list of modules."""
    if value.dim() > 2:
        return any(u.chosen for u in uses)
    if listed:
        return not uses or any(u.chosen and u.tokens < tokens for u in uses)
    used = sum(size for _, size in {u.part for u in uses})
    return any(u.chosen for u in uses) and used < value.numel()


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for i in range(1, len(parts) + 1):
        yield ".".join(parts[:i])


def call_experts(block: nn.Module, name: str, places: Places, like: Tensor) -> tuple[list[Matmul], set[str]]:
    """The products when a module of a block is called like experts, on rows that choose the first two of them.

    In the block's own run with zeros as parameters, equal scores may choose only experts without any product. Returns
    also the parameters whose products have an input that other products made.
    """
    rows = torch.zeros(FIRST, places.width, dtype=like.dtype)
    choices = torch.arange(FIRST).expand(FIRST, -1).contiguous()
    routed = Routed(rows, choices, torch.ones(FIRST, FIRST, dtype=like.dtype))
    # The module's code may fail in any way on such a call: then the block's own run has to do.
    with suppress(Exception), watch_matmuls(block) as matmuls, follow_products(block) as following:
        places.call(routed).run(block.get_submodule(name), rows)
    return matmuls, {m.parameter for m in matmuls if m.input is not None and following.before(m.input)}


def find_parts(
    block: nn.Module, routed: Sequence[str], matmuls: list[Matmul], more: list[Matmul], inner: set[str], tokens: int
) -> list[PartsInfo]:
    """The experts' parts of a block's parameters. Empty if the products of one of them cannot be told apart.

    routed: the parameters that may hold experts; matmuls: of a run of the block with this number of tokens; more,
    inner: as from `call_experts`.
    """
    inputs: dict[tuple[int, int], int] = {}
    found: dict[str, PartsInfo] = {}
    for parameter in routed:
        value = block.get_parameter(parameter)
        own, extra = ([use for use in those if use.parameter == parameter] for those in (matmuls, more))
        stack = _stack(value, [*extra, *own], inputs)
        module, _, leaf = parameter.rpartition(".")
        if stack is None or not module:
            return []
        before = found.get(module, PartsInfo(module, 0, {}, 1))
        count = max(before.count, value.shape[0] if stack.count is None else stack.count)
        copies = max(before.copies, -(-sum(use.tokens for use in own) // tokens))
        stacks = before.stacks | {leaf: replace(stack, row_parallel=parameter in inner)}
        found[module] = PartsInfo(module, count, stacks, copies)
    return list(found.values())


def _stack(value: Tensor, uses: list[Matmul], inputs: dict[tuple[int, int], int]) -> Stack | None:
    """A parameter whose products used whole entries of it; None if they did not. inputs: numbers of known inputs."""
    sizes, axes = {_size(value, use) for use in uses}, {use.along for use in uses}
    if len(sizes) != 1 or len(axes) != 1:
        return None
    (size,), (axis,) = sizes, axes
    fed = next((use for use in uses if use.input is not None and use.input.numel()), None)
    if not size or axis is None or fed is None or any(use.part[0] % size for use in uses):
        return None
    count = None if value.dim() == 3 else value.numel() // size
    if count == 1 or (count is None and not axis):
        return None
    assert fed.input is not None
    number = inputs.setdefault((fed.input.data_ptr(), fed.part[0] // size), len(inputs))
    return Stack(axis - (value.dim() - 2), number, row_parallel=False, count=count)


def _size(value: Tensor, use: Matmul) -> int:
    """The number of elements of each entry that a product used; 0 if it used something else."""
    if not use.dense:
        return 0
    if value.dim() == 3:
        size = value[0].numel()
        return 0 if use.part[1] % size else size
    size = use.part[1]
    return 0 if value.dim() != 2 or value.numel() % size or size % value.shape[1] else size
