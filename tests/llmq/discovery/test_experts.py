"""Routed experts: found by how they are called, and run one at a time to the output of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.discovery import blocks as discover
from llmq.discovery.blocks import find
from llmq.discovery.experts import (
    Expert,
    ExpertsInfo,
    Places,
    Routed,
    Stack,
    describe,
    instead,
    places_of,
    watch_experts,
)
from llmq.errors import LlmqError
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.refusal import refused

ROWS, WIDTH, INNER, COUNT = 9, 12, 20, 5
T, K = 7, 2
X, CHOICES, WEIGHTS = torch.randn(T, WIDTH), torch.zeros(T, K, dtype=torch.long), torch.rand(T, K)

OUTER, INNER_STACK = Stack(1, 0, False), Stack(1, 1, True)
KINDS = {
    # type: module, stacks, other parameters with an entry per expert, blocks of four that have experts
    "qwen3_moe": ("mlp.experts", {"gate_up_proj": OUTER, "down_proj": INNER_STACK}, (), 4),
    "granitemoe": ("block_sparse_moe.experts", {"gate_up_proj": OUTER, "down_proj": INNER_STACK}, (), 4),
    "jamba": ("feed_forward.experts", {"gate_up_proj": OUTER, "down_proj": INNER_STACK}, (), 2),
    "nemotron_h": ("mixer.experts", {"up_proj": OUTER, "down_proj": INNER_STACK}, (), 1),
    "deepseek_v4": ("mlp.experts", {"gate_up_proj": OUTER, "down_proj": INNER_STACK}, (), 4),
    "aria_text": ("mlp.experts", {"gate_up_proj": Stack(0, 0, False), "down_proj": Stack(0, 1, True)}, (), 4),
    "gpt_oss": (
        "mlp.experts",
        {"gate_up_proj": Stack(0, 0, False), "down_proj": Stack(0, 1, True)},
        ("gate_up_proj_bias", "down_proj_bias"),
        4,
    ),
}


def infos(kind: str) -> list[ExpertsInfo]:
    return [b.experts for b in mixtures.structure(kind).blocks if b.experts is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_real_types(kind: str) -> None:
    module, stacks, others, blocks = KINDS[kind]
    found = infos(kind)
    assert len(found) == blocks
    for info in found:
        assert (info.module, info.count, info.stacks) == (module, 4, stacks)
        assert set(info.parameters) == {*stacks, *others}
        assert info.call == Places(0, 1, 2, 64, 2)


def test_stacks_are_no_weights_of_the_block_and_parameters_stay_without_memory(tmp_path: Any) -> None:
    tiny.config("gpt_oss").save_pretrained(tmp_path)
    model = discover.build(tmp_path, torch.float32)
    for block in find(model).blocks:
        assert block.experts is not None
        stacks = {f"{block.experts.module}.{name}" for name in block.experts.stacks}
        assert not stacks & {w.view.parameter for w in block.weights}
        assert not {f"{block.name}.{name}" for name in stacks} & block.left.keys()
    assert all(p.is_meta for p in model.parameters())
    state = model.state_dict()
    for name, parameter in discover.build(tmp_path, torch.float32).named_parameters():
        assert state[name].shape == parameter.shape


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mamba", "gpt2"])
def test_dense_models_have_none(kind: str) -> None:
    assert all(block.experts is None for block in mixtures.structure(kind).blocks)


REFUSED = {
    "longcat_flash": "the experts of mlp.experts cannot be quantized yet: its stacks have 4 and 6 experts",
    "llama4_text": "feed_forward.experts.gate_up_proj sees only the tokens routed to it",
    "dbrx": "ffn.experts.mlp.w1 sees only the tokens routed to it",
}


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in tiny.TYPES])
def test_experts_that_are_neither_run_singly_nor_parts_of_parameters_are_refused_by_name(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discover, "find_parts", lambda *args: [])
    refused(lambda: mixtures.structure(kind), REFUSED[kind])


# One expert is what the module of all experts computes for rows that all choose it.


@pytest.mark.parametrize(
    "kind", [kind for kind in (*KINDS, "mixtral", "minimax_m3_vl_text", "inkling2_text") if kind in tiny.TYPES]
)
def test_an_expert_computes_what_the_module_does_for_rows_that_choose_it(kind: str) -> None:
    model: Any = tiny.model(kind)
    model.set_experts_implementation("eager")
    block = next(b for b in mixtures.structure(kind).blocks if b.experts is not None)
    info = block.experts
    assert info is not None
    module = model.get_submodule(f"{block.name}.{info.module}")
    rows = torch.randn(ROWS, info.call.width)
    singles = []
    before = {name: p.clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for e in range(info.count):
            entries = {name: module.get_parameter(name).data[e] for name in info.parameters}
            expert = Expert(module, info.call, entries)
            assert {n: p.shape for n, p in expert.named_parameters()} == {n: p.shape for n, p in entries.items()}
            want = module(rows, torch.full((ROWS, 1), e), torch.ones(ROWS, 1))
            singles.append(expert(rows))
            assert torch.allclose(singles[-1], want, rtol=1e-4, atol=1e-6)
            assert expert(rows[:0]).shape == (0, info.call.width)
        # Each is another one, and weighted they add up to what the module returns.
        assert all(not torch.allclose(singles[0], other, rtol=0.1) for other in singles[1:])
        choices = torch.stack([torch.randperm(info.count)[:2] for _ in range(ROWS)])
        weights = torch.rand(ROWS, 2)
        total = module(rows, choices, weights)
        for i in range(ROWS):
            want_row = sum(float(w) * singles[int(e)][i] for e, w in zip(choices[i], weights[i], strict=True))
            assert torch.allclose(total[i], torch.as_tensor(want_row), rtol=1e-3, atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_a_changed_entry_changes_its_expert_and_nothing_else() -> None:
    module = Gated()
    entries = {n: p.data[2].clone() for n, p in module.named_parameters()}
    expert = Expert(module, PLACES, entries)
    with torch.no_grad():
        one = expert(X)
        expert.get_parameter("down").zero_()
        assert torch.equal(expert(X), torch.zeros_like(X)) and not torch.equal(one, torch.zeros_like(X))
        assert bool(module.down[2].any())
        module.broken = True
        with pytest.raises(RuntimeError):
            expert(X)
    assert module.down.shape == (COUNT, WIDTH, INNER) and "down" in dict(module.named_parameters())


# Modules made for the purpose.

PLACES = Places(0, 1, 2, WIDTH, K)


class Gated(nn.Module):
    """Experts of the usual kind; `change` is what is wrong with them."""

    def __init__(self, change: Callable[..., Tensor] | None = None, **more: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(COUNT, INNER, WIDTH)),
            nn.Parameter(torch.randn(COUNT, WIDTH, INNER)),
        )
        for name, shape in more.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.change, self.broken = change, False

    def forward(self, rows: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError
        out = torch.zeros_like(rows)
        for e in range(len(self.up)):
            token, place = torch.where(choices == e)
            y = nn.functional.linear(nn.functional.linear(rows[token], self.up[e]).relu(), self.down[e])
            out.index_add_(0, token, y * weights[token, place, None])
        return out if self.change is None else self.change(self, rows, choices, weights, out)


def block_of(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"experts": experts})


def test_a_module_of_the_usual_kind_is_described() -> None:
    module = Gated(bias=(COUNT, 3), alone=(WIDTH, WIDTH))
    before = {n: p.data for n, p in module.named_parameters()}
    info = describe(block_of(module), "experts", PLACES)
    assert isinstance(info, ExpertsInfo)
    assert (info.count, info.stacks) == (COUNT, {"up": Stack(1, 0, False), "down": Stack(1, 1, True)})
    assert set(info.parameters) == {"up", "down", "bias"}
    assert all(p.data_ptr() == before[n].data_ptr() for n, p in module.named_parameters())


def used_whole(m: Any, rows: Tensor, choices: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    return out + torch.einsum("th,ehk->tk", rows, m.extra) * 0


def scaled_by_expert(m: Any, rows: Tensor, choices: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    scale: Tensor = m.scale
    return out * scale[choices].prod(1, keepdim=True)


SUM, USED = "is not the weighted sum", "not every stack is used as one matrix per expert"
WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two numbers of experts": (lambda: Gated(zero=(COUNT + 2, 4, 4)), f"stacks have {COUNT} and {COUNT + 2} experts"),
    "an output with a part of no expert": (lambda: Gated(lambda m, r, c, w, o: o + r), SUM),
    "an output that is normed": (lambda: Gated(lambda m, r, c, w, o: o / o.norm()), SUM),
    "weights that count twice": (lambda: Gated(lambda m, r, c, w, o: o * w.sum(1, keepdim=True)), SUM),
    "a number for each expert": (lambda: Gated(scaled_by_expert, scale=(COUNT,)), SUM),
    "it asks for two choices": (
        lambda: Gated(lambda m, r, c, w, o: o + 0 * c.view(len(r), 2).sum()),
        "one expert alone cannot be run (RuntimeError)",
    ),
    "a stack that nothing uses": (lambda: Gated(extra=(COUNT, 4, 4)), USED),
    "a stack used whole": (lambda: Gated(used_whole, extra=(COUNT, WIDTH, WIDTH)), USED),
    "a stack of four axes": (lambda: Gated(extra=(COUNT, 2, 4, 4)), USED),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_run_singly_is_said(wrong: str) -> None:
    make, words = WRONG[wrong]
    module = make()
    before = {n: p.data for n, p in module.named_parameters()}
    said = describe(block_of(module), "experts", PLACES)
    assert isinstance(said, str) and words in said, said
    assert all(
        p.data_ptr() == before[n].data_ptr() and p.shape == before[n].shape for n, p in module.named_parameters()
    )


# How a module is called.


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        ((X, CHOICES, WEIGHTS), {}, Places(0, 1, 2, WIDTH, K)),
        ((X, WEIGHTS, CHOICES), {}, Places(0, 2, 1, WIDTH, K)),
        ((X,), {"index": CHOICES, "weights": WEIGHTS}, Places(0, "index", "weights", WIDTH, K)),
        ((X, CHOICES), {"weights": WEIGHTS, "other": None}, Places(0, 1, "weights", WIDTH, K)),
        ((X, CHOICES.int(), WEIGHTS.double()), {}, Places(0, 1, 2, WIDTH, K)),
        ((X, CHOICES), {}, None),
        ((X, CHOICES, WEIGHTS, X), {}, None),
        ((X, CHOICES, WEIGHTS, 3), {}, None),
        ((X, CHOICES.bool(), WEIGHTS), {}, None),
        ((X, CHOICES[:, :1], WEIGHTS), {}, None),
        ((X, CHOICES[:3], WEIGHTS[:3]), {}, None),
        ((X[:, :5], CHOICES, WEIGHTS), {}, None),
        ((X, CHOICES, CHOICES), {}, None),
        ((X[None], CHOICES, WEIGHTS), {}, None),
    ],
)
def test_where_rows_choices_and_weights_are(args: tuple[Any, ...], kwargs: dict[str, Any], want: Places | None) -> None:
    found = places_of(args, kwargs, torch.zeros(T, WIDTH))
    assert found == want
    if found is None:
        return
    routed = found.of(args, kwargs)
    assert (
        routed.rows is X
        and torch.equal(routed.choices.long(), CHOICES)
        and torch.allclose(routed.weights.float(), WEIGHTS)
    )
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    found.call(routed).run(lambda *a, **k: seen.append((a, k)) or X, X)  # type: ignore[func-returns-value]
    ((again, named),) = seen
    assert all(a is b for a, b in zip(again, args, strict=True))
    assert named == {name: value for name, value in kwargs.items() if value is not None}


@pytest.mark.parametrize("output", [(X,), X[None], X[:, :5], X[:3]])
def test_what_returns_no_rows_is_no_module_of_experts(output: Any) -> None:
    assert places_of((X, CHOICES, WEIGHTS), {}, output) is None


def test_only_modules_with_stacks_of_their_own_are_watched() -> None:
    class Without(nn.Module):
        def forward(self, rows: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
            return rows

    block = nn.ModuleDict({"experts": Gated(), "other": Without(), "idle": Gated()})
    noticed: list[tuple[Routed, Tensor]] = []
    with watch_experts(block, lambda *call: noticed.append(call)) as seen:
        returned = [block[name](X, CHOICES, weights=WEIGHTS) for name in ("experts", "other")]
    assert seen == {"experts": [Places(0, 1, "weights", WIDTH, K)]}
    ((routed, output),) = noticed
    assert routed.rows is X and routed.choices is CHOICES and routed.weights is WEIGHTS and output is returned[0]
    block["idle"](X, CHOICES, WEIGHTS)
    assert "idle" not in seen and not block["idle"]._forward_hooks


def test_a_block_with_two_modules_of_experts_is_refused() -> None:
    block = nn.ModuleDict({"one": Gated(), "two": Gated()})
    with pytest.raises(LlmqError, match="several modules of experts \\(one, two\\)"):
        discover._experts(block, {"one": [PLACES], "two": [PLACES]}, [], X)
    with pytest.raises(LlmqError, match="calls its experts \\(one\\) more than once"):
        discover._experts(block, {"one": [PLACES, PLACES]}, [], X)


def test_a_function_in_place_of_experts() -> None:
    module = Gated()
    block = block_of(module)
    info = describe(block, "experts", PLACES)
    assert isinstance(info, ExpertsInfo)
    with instead(block, info, lambda routed: routed.rows + routed.choices.sum() + routed.weights.sum()):
        assert torch.equal(module(X, CHOICES, WEIGHTS), X + WEIGHTS.sum())
    with pytest.raises(KeyError), instead(block, info, lambda routed: {}[0]):  # type: ignore[index]
        module(X, CHOICES, WEIGHTS)
    assert not torch.equal(module(X, CHOICES, WEIGHTS), X) and "forward" not in vars(module)
