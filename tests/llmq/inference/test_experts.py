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
from tests.architectures import tiny
from tests.llmq.inference.test_stack import values, weight
from tests.llmq.packed_mixtures import mixture
from tests.llmq.refusal import refused
from tests.llmq.written import Case

EXPERTS, WIDTH = 3, 64


def stack(name: str, out: int, seed: int, **options: Any) -> tuple[PackedStack, Tensor]:
    made = [weight(seed + e, out, **options) for e in range(EXPERTS)]
    return packed_stack(name, (EXPERTS, out, WIDTH), False, [[w] for w in made], torch.float32, "f"), torch.stack(
        [values(w) for w in made]
    )


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
    for first, second, gated in ((ordered, plain, True), (plain, stack("other", WIDTH, 3)[0], False)):
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
def test_compiled_whole(folder: Path) -> None:
    model = llmq.load(folder, device_map="cpu", dtype="float32")
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
        wanted = model(x).logits
        for name in ("eager", "grouped_mm", NAME):
            model.set_experts_implementation(name)
            torch.testing.assert_close(model(x).logits, wanted, rtol=1e-4, atol=1e-5)
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
