"""Experts as parts of a block's parameters: which part is whose, found from products alone, in real types and toys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery.blocks import BlockInfo
from llmq.discovery.calls import record
from llmq.discovery.experts import Places, Stack
from llmq.discovery.inputs import at_products
from llmq.discovery.matmuls import watch_matmuls
from llmq.discovery.parts import PartsInfo, call_experts, find_parts
from llmq.discovery.reasons import Kind
from llmq.discovery.view import View
from tests.architectures import tiny
from tests.llmq import mixtures

# By the source of transformers' modeling files.
KINDS = {
    # Four experts, and two that return their input and yet have an entry.
    "longcat_flash": [
        PartsInfo("mlp.experts", 6, {"gate_up_proj": Stack(1, 0, False), "down_proj": Stack(1, 1, True)}, 1)
    ],
    # One product over all experts, of every token: those of others are multiplied by 0.
    "llama4_text": [
        PartsInfo("feed_forward.experts", 4, {"gate_up_proj": Stack(0, 0, False), "down_proj": Stack(0, 1, False)}, 4)
    ],
    # The queries and the output of attention are experts, too.
    "jetmoe": [
        PartsInfo("mlp.input_linear", 4, {"weight": Stack(1, 0, False)}, 2),
        PartsInfo("mlp.output_linear", 4, {"weight": Stack(1, 1, False)}, 2),
        PartsInfo("self_attention.experts.input_linear", 4, {"weight": Stack(1, 2, False)}, 2),
        PartsInfo("self_attention.experts.output_linear", 4, {"weight": Stack(1, 3, False)}, 2),
    ],
    # All experts' matrices one below the other, the last one stored as [in, out].
    "dbrx": [
        PartsInfo(
            "ffn.experts.mlp",
            4,
            {"w1": Stack(1, 0, False, 4), "v1": Stack(1, 0, False, 4), "w2": Stack(0, 1, False, 4)},
            1,
        )
    ],
}
KINDS["llama4"] = KINDS["llama4_text"]


def views(block: BlockInfo) -> list[View]:
    """The view of every expert's matrix in a block."""
    return [
        View(f"{info.module}.{name}", expert, None, stack.axis == 0, stack.count)
        for info in block.parts
        for name, stack in info.stacks.items()
        for expert in range(info.count)
    ]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in tiny.TYPES])
def test_parts_of_real_types(kind: str) -> None:
    for block in mixtures.structure(kind).blocks:
        assert list(block.parts) == KINDS[kind] and block.experts is None and block.mixture
        stacks = {name for info in block.parts for name in info.names}
        assert not stacks & {w.view.parameter for w in block.weights}
        # All else is quantized, but for what chooses the experts.
        assert {reason.kind for reason in block.left.values()} == {Kind.ROUTER}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in tiny.TYPES])
def test_every_product_with_a_stack_is_that_of_its_views(kind: str) -> None:
    """In an ordinary pass, the views take as many rows as the products with stacks have, and of the right width."""
    model: Any = tiny.model(kind)
    structure = mixtures.structure(kind)
    blocks = [model.get_submodule(block.name) for block in structure.blocks]
    recording = record(model, blocks, [tiny.tokens()])
    module, found = blocks[1], structure.blocks[1]
    stacks = {name for info in found.parts for name in info.names}
    taken: dict[View, list[Tensor]] = {}

    def keep(view: View) -> Callable[[Tensor], None]:
        return lambda x: taken.setdefault(view, []).append(x)

    mine = [v for v in views(found) if v.index is not None and v.index < len(module.get_parameter(v.parameter))]
    with torch.no_grad(), watch_matmuls(module) as matmuls, at_products(module, {v: keep(v) for v in mine}):
        recording.calls[0][1].run(module, recording.hidden[0])
    products = [m for m in matmuls if m.parameter in stacks]
    assert products and {m.parameter for m in products} == {view.parameter for view in taken}
    for view, inputs in taken.items():
        weight = view.get(module)
        assert all(x.shape[-1] == weight.shape[1] for x in inputs)
    rows = sum(x.shape[:-1].numel() for inputs in taken.values() for x in inputs)
    assert rows == sum(m.tokens for m in products)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "granitemoe", "llama"])
def test_experts_that_can_be_run_alone_and_dense_blocks_have_none(kind: str) -> None:
    assert not any(block.parts for block in mixtures.structure(kind).blocks)


def test_a_stack_that_all_tokens_go_through_beside_routed_experts_is_left_alone() -> None:
    for block in mixtures.structure("inkling_text").blocks:
        assert block.experts is not None and block.experts.module == "mlp.experts" and not block.parts
        shared = {n: r.kind for n, r in block.left.items() if "shared" in n}
        names = ("gate_proj", "up_proj", "down_proj")
        assert shared == {f"{block.name}.mlp.shared_experts.{name}": Kind.NOT_LINEAR for name in names}


# Toys.

COUNT, OUT, IN, TOKENS = 3, 6, 4, 5
X = torch.randn(TOKENS, IN)
Run = Callable[[Any, Tensor], object]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.stack = nn.Parameter(torch.randn(COUNT, OUT, IN))
        self.inner.turned = nn.Parameter(torch.randn(COUNT, IN, OUT))
        self.inner.flat = nn.Parameter(torch.randn(COUNT * OUT, IN))


def found(names: list[str], run: Run) -> list[PartsInfo]:
    toy = Toy()
    with torch.no_grad(), watch_matmuls(toy) as matmuls:
        run(toy.inner, X)
    return find_parts(toy, [f"inner.{name}" for name in names], matmuls, [], set(), TOKENS)


def stacks(names: list[str], run: Run) -> dict[str, Stack]:
    (info,) = found(names, run)
    assert info.module == "inner" and info.count == COUNT
    return info.stacks


linear = nn.functional.linear


@pytest.mark.parametrize(
    ("name", "run", "want"),
    [
        ("stack", lambda m, x: linear(x, m.stack[1]), Stack(1, 0, False)),
        ("stack", lambda m, x: [linear(x, m.stack[e]) for e in (0, 2)], Stack(1, 0, False)),
        ("stack", lambda m, x: torch.bmm(x.expand(COUNT, -1, -1), m.stack.mT), Stack(1, 0, False)),
        ("stack", lambda m, x: torch.bmm(x.expand(2, -1, -1), m.stack[1:].mT), Stack(1, 0, False)),
        ("turned", lambda m, x: x @ m.turned[2], Stack(0, 0, False)),
        ("turned", lambda m, x: torch.bmm(x.expand(COUNT, -1, -1), m.turned), Stack(0, 0, False)),
        ("flat", lambda m, x: x @ m.flat.view(COUNT, OUT, IN)[2].T, Stack(1, 0, False, COUNT)),
        ("flat", lambda m, x: torch.randn(2, OUT) @ m.flat[OUT : 2 * OUT], Stack(0, 0, False, COUNT)),
        # Without rows nothing is known of the input.
        ("stack", lambda m, x: [linear(x[:0], m.stack[0]), linear(x, m.stack[1])], Stack(1, 0, False)),
    ],
)
def test_entries(name: str, run: Run, want: Stack) -> None:
    assert stacks([name], run) == {name: want}


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("stack", lambda m, x: linear(x, m.stack[1, :3])),  # half an expert
        ("stack", lambda m, x: linear(x[:, :2], m.stack[1, :, :2])),
        ("stack", lambda m, x: linear(x, m.stack[:, 1])),  # one row of every expert
        ("stack", lambda m, x: linear(x, m.stack.view(-1, IN)[2:8])),  # across two
        ("stack", lambda m, x: torch.einsum("ni,oi->no", x, m.stack[1])),  # along which axis is not known
        ("stack", lambda m, x: [linear(x, m.stack[0]), x @ m.stack[1].view(IN, OUT)]),  # in two ways
        ("stack", lambda m, x: linear(x[:0], m.stack[1])),  # never for a row
        ("stack", lambda m, x: x + 1),
        ("flat", lambda m, x: [linear(x, m.flat[:OUT]), linear(x, m.flat[:2])]),  # of different sizes
        ("flat", lambda m, x: linear(x, m.flat[1 : OUT + 1])),
        ("flat", lambda m, x: linear(x, m.flat[: OUT + 1])),
        ("flat", lambda m, x: linear(x, m.flat)),  # that is one matrix
    ],
)
def test_what_is_no_entry(name: str, run: Run) -> None:
    assert not found([name], run)
    # One such parameter is enough: its experts would not be told apart.
    assert not found(["turned", name], lambda m, x: (x @ m.turned[0], run(m, x)))


def test_stacks_that_are_fed_by_one_tensor_have_one_number() -> None:
    def run(m: Any, x: Tensor) -> None:
        rows = x[[0, 2]]
        linear(linear(rows, m.stack[1]), m.turned[1])
        linear(rows, m.flat[OUT : 2 * OUT])

    numbers = {name: stack.input_id for name, stack in stacks(["stack", "flat", "turned"], run).items()}
    assert numbers["stack"] == numbers["flat"] != numbers["turned"]


def test_how_many_rows_a_token_becomes() -> None:
    (info,) = found(["stack"], lambda m, x: [linear(x[:4], m.stack[e]) for e in range(COUNT)])
    assert info.copies == 3  # 12 rows of 5 tokens


def test_a_parameter_of_the_block_itself_is_not_taken() -> None:
    toy: Any = Toy().inner
    with torch.no_grad(), watch_matmuls(toy) as matmuls:
        linear(X, toy.stack[0])
    assert not find_parts(toy, ["stack"], matmuls, [], set(), TOKENS)


class Chosen(nn.Module):
    """Experts with one more entry than they use, whose last choice returns the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(COUNT + 1, OUT, IN))
        self.down = nn.Parameter(torch.randn(COUNT, IN, OUT))

    def forward(self, rows: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for e in range(COUNT + 1):
            token, place = torch.where(choices == e)
            if len(token):
                inner = rows[token] if e == COUNT else linear(linear(rows[token], self.up[e]).relu(), self.down[e])
                total.index_add_(0, token, inner * weights[token, place, None])
        return total


def test_experts_that_the_blocks_own_run_does_not_choose_are_called() -> None:
    block, places = nn.ModuleDict({"inner": Chosen()}), Places(0, 1, 2, IN, 2)
    with torch.no_grad():
        with watch_matmuls(block) as own:
            block["inner"](X, torch.full((TOKENS, 1), COUNT), torch.ones(TOKENS, 1))
        more, inner = call_experts(block, "inner", places, X)
    assert not own and {m.parameter for m in more} == {"inner.up", "inner.down"} and inner == {"inner.down"}
    (info,) = find_parts(block, ["inner.up", "inner.down"], own, more, inner, TOKENS)
    assert info == PartsInfo("inner", COUNT + 1, {"up": Stack(1, 0, False), "down": Stack(1, 1, True)}, 1)


def test_experts_that_cannot_be_called_so_are_known_by_the_blocks_own_run() -> None:
    class Strict(Chosen):
        def forward(self, rows: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
            if len(rows) != TOKENS:
                raise RuntimeError("as many rows as the window has")
            return super().forward(rows, choices, weights)

    block = nn.ModuleDict({"inner": Strict()})
    with torch.no_grad(), watch_matmuls(block) as own:
        block["inner"](X, torch.zeros(TOKENS, 1, dtype=torch.long), torch.ones(TOKENS, 1))
        called = call_experts(block, "inner", Places(0, 1, 2, IN, 2), X)
    assert called == ([], set())
    (info,) = find_parts(block, ["inner.up", "inner.down"], own, *called, TOKENS)
    assert info.stacks == {"up": Stack(1, 0, False), "down": Stack(1, 1, False)}
