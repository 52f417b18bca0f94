"""Packed experts under transformers' protocol: chosen where it applies, compiled whole, generating, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.inference.experts import NAME, grouped, use_packed
from llmq.inference.stack import PackedStack, packed_stack
from llmq_kernels.int_linear import layouts
from tests.architectures import tiny
from tests.llmq.inference.test_stack import values, weight
from tests.llmq.packed_mixtures import mixture
from tests.llmq.refusal import refused
from tests.llmq.written import Case

EXPERTS, WIDTH = 3, 64


def stack(
    name: str, out: int, seed: int, width: int = WIDTH, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PackedStack, Tensor]:
    made = [weight(seed + e, out, width=width, **options) for e in range(EXPERTS)]
    dense = torch.stack([values(w) for w in made])
    return packed_stack(name, (EXPERTS, out, width), False, [[w] for w in made], dtype, "f"), dense


class Config:
    _experts_implementation = "eager"


class Experts(nn.Module):
    """Experts whose implementation can be chosen, as transformers' decorator leaves them; eager: a loop."""

    def __init__(self, first: PackedStack, second: PackedStack, gated: bool) -> None:
        super().__init__()
        self.config, self.has_gate, self.has_bias, self.has_post_expert_norm = Config(), gated, False, False
        self.one, self.two, self.act_fn = first, second, nn.SiLU()
        self.ran = 0

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self.act_fn(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :]

    def _loop(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        self.ran += 1
        return x

    def forward(self, *args: Tensor) -> Tensor:
        return grouped(self, *args)

    forward.__wrapped__ = _loop  # type: ignore[attr-defined]


def routed(rows: int = 7, chosen: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    choices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:chosen] for _ in range(rows)])
    return torch.randn(rows, WIDTH, generator=generator), choices, torch.rand(rows, chosen, generator=generator)


@pytest.mark.parametrize("swapped", [False, True])
def test_gated_experts_are_the_weighted_sum(swapped: bool) -> None:
    (first, up), (second, down) = stack("up", 2 * WIDTH, 0), stack("down", WIDTH, 9)
    experts = Experts(second, first, True) if swapped else Experts(first, second, True)
    use_packed(experts)
    assert experts.config._experts_implementation == NAME
    x, choices, weights = routed()
    wanted = torch.zeros_like(x)
    for row in range(len(x)):
        for e, w in zip(choices[row], weights[row], strict=True):
            inner = up[e] @ x[row]
            wanted[row] += w * (down[e] @ (nn.functional.silu(inner[:WIDTH]) * inner[WIDTH:]))
    torch.testing.assert_close(experts(x, choices, weights), wanted, rtol=1e-4, atol=1e-4)
    assert experts.ran == 0


@pytest.mark.parametrize("swapped", [False, True])
def test_without_gates_the_width_of_the_rows_tells_which_stack_is_first(swapped: bool) -> None:
    (first, up), (second, down) = stack("up", 96, 0), stack("down", WIDTH, 9, width=96)
    experts = Experts(second, first, False) if swapped else Experts(first, second, False)
    use_packed(experts)
    x, choices, weights = routed()
    wanted = torch.zeros_like(x)
    for row in range(len(x)):
        for e, w in zip(choices[row], weights[row], strict=True):
            wanted[row] += w * (down[e] @ nn.functional.silu(up[e] @ x[row]))
    torch.testing.assert_close(experts(x, choices, weights), wanted, rtol=1e-4, atol=1e-4)
    assert experts.ran == 0


def test_no_rows_at_all() -> None:
    """As where a block's tokens all go another way."""
    experts = Experts(stack("up", 2 * WIDTH, 0)[0], stack("down", WIDTH, 9)[0], True)
    use_packed(experts)
    found = experts(torch.empty(0, WIDTH), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert found.shape == (0, WIDTH) and experts.ran == 0


def test_biases_and_a_norm() -> None:
    (first, up), (second, down) = stack("up", 2 * WIDTH, 0), stack("down", WIDTH, 9)
    experts = Experts(first, second, True)
    experts.has_bias = experts.has_post_expert_norm = True
    experts.one_bias, experts.two_bias = nn.Parameter(torch.randn(3, 128)), nn.Parameter(torch.randn(3, WIDTH))
    experts.requires_grad_(False)
    experts.post_expert_norm = nn.Tanh()
    use_packed(experts)
    x, choices, weights = routed(chosen=1)
    wanted = []
    for row, e in enumerate(choices[:, 0]):
        inner = experts._apply_gate((up[e] @ x[row] + experts.one_bias[e])[None])[0]
        wanted.append(weights[row] * torch.tanh(down[e] @ inner + experts.two_bias[e]))
    torch.testing.assert_close(experts(x, choices, weights), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_what_one_operator_cannot_run_runs_the_models_own_code() -> None:
    ordered = stack("up", 2 * WIDTH, 0, order=True)[0]
    plain = stack("down", WIDTH, 9)[0]
    square = stack("other", WIDTH, 3)[0]  # without gates nothing tells which of two squares is first
    for first, second, gated in ((ordered, plain, True), (plain, square, False)):
        experts = Experts(first, second, gated)
        use_packed(experts)
        x, *rest = routed()
        assert experts(x, *rest) is x and experts.ran == 1


def test_classes_that_choose_nothing_are_left_alone() -> None:
    experts = Experts(stack("up", 2 * WIDTH, 0)[0], stack("down", WIDTH, 9)[0], True)
    del experts.has_gate
    use_packed(experts)
    assert experts.config._experts_implementation == "eager"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixture")
    mixture(made, "qwen3_moe", Case("ct"))
    return made / "packed"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "nemotron_h"])
def test_compiled_whole(model_type: str, tmp_path: Path) -> None:
    """Experts with and without gates: a loop over those that are chosen would break the graph."""
    mixture(tmp_path, model_type, Case("ct"))
    model = llmq.load(tmp_path / "packed", device_map="cpu", dtype="float32")
    x = tiny.tokens()
    with torch.inference_mode():
        wanted = model(x).logits
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_generates_as_the_dense_model(tmp_path: Path) -> None:
    dense = mixture(tmp_path, "mixtral", Case("ct"))
    model = llmq.load(tmp_path / "packed", device_map="cpu", dtype="float32")
    x = tiny.tokens(1, 8)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(x)}
    assert torch.equal(model.generate(x, **options), dense.generate(x, **options))


def test_other_implementations(folder: Path) -> None:
    model = llmq.load(folder, device_map="cpu", dtype="float32")
    x = tiny.tokens()
    with torch.inference_mode():
        model.set_experts_implementation("eager")
        wanted, one = model(x).logits, model(x[:1, :1]).logits
        for name in ("grouped_mm", NAME):
            model.set_experts_implementation(name)
            torch.testing.assert_close(model(x).logits, wanted, rtol=1e-4, atol=1e-5)
            # One token: pairs of it and its experts, which nothing sorts.
            torch.testing.assert_close(model(x[:1, :1]).logits, one, rtol=1e-4, atol=1e-5)
        model.set_experts_implementation("batched_mm")
        refused(lambda: model(x), "is packed", "set_experts_implementation")


def test_dense_models_may_be_given_the_implementation(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.make("qwen3_moe", tmp_path / "m")).eval()
    x = tiny.tokens()
    with torch.inference_mode():
        wanted = model(x).logits
        model.set_experts_implementation(NAME)
        torch.testing.assert_close(model(x).logits, wanted)


@pytest.mark.slow
def test_adapters_on_attention_are_trained_through_packed_experts(folder: Path) -> None:
    import peft

    model = llmq.load(folder, device_map="cpu", dtype="float32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    x = tiny.tokens()
    adapted(x, labels=x).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(grads) == 8 and all(g is not None and bool(g.any()) for g in grads)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and "lora" not in n]
    every = peft.get_peft_model(
        llmq.load(folder, device_map="cpu", dtype="float32"), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    assert not [n for n, _ in every.named_parameters() if "lora" in n and "experts" in n], "stacks are no linear layers"


@pytest.mark.parametrize("rows", [7, 1])
def test_the_kernels_of_gpus(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: many rows, which are sorted, and one, which is not, as in a CPU's own layout."""
    pytest.importorskip("triton")
    x, choices, weights = routed(rows)
    x, weights, found = x.bfloat16(), weights.bfloat16(), []
    usual = layouts.choose
    for layout in (None, "planes"):
        if layout:
            monkeypatch.setattr(layouts, "choose", lambda *a: ("planes", {}) if a[1] == torch.bfloat16 else usual(*a))
        parts = (stack("up", 2 * WIDTH, 0, dtype=torch.bfloat16)[0], stack("down", WIDTH, 9, dtype=torch.bfloat16)[0])
        experts = Experts(*parts, True)
        assert (parts[0]._first()._like[0].layout == "planes") == bool(layout)
        use_packed(experts)
        found.append(experts(x, choices, weights).float())
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02 * float(found[0].abs().max()))
