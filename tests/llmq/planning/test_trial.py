"""What a quantizer returns is stored and read back at plan time; what does not fit is refused by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq import job, methods
from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Activations, Scheme
from llmq.methods.base import Method, Stats
from llmq.planning.trial import try_quantizer
from llmq.planning.weights import WeightPlan
from llmq.recipe import catalog
from llmq.recipe.recipe import Recipe
from tests.llmq.refusal import refused

W4 = Scheme(4, 32)
HOST = torch.device("cpu")
SCHEMES = [
    W4,
    Scheme(3, 48, symmetric=False),
    Scheme(2, None),
    Scheme(4, 512),
    Scheme(8, None, activations=Activations(dynamic=False)),
    Scheme(8, None, activations=Activations()),
    Scheme(8, None, grid="fp8"),
    Scheme(1, 8, grid="vq"),
    Scheme(8, None, grid="fp8", activations=Activations()),
    Scheme(4, 64, grid="nf4"),
    Scheme(4, 64, grid="nf4", double_quant=True),
]
OWN = [name for name in catalog.names() if "quantize" in catalog.describe(name).roles]


def item(scheme: Scheme | None, name: str = "layers.3.mlp.first", shape: tuple[int, int] = (96, 2304)) -> WeightPlan:
    return WeightPlan(name, f"{name}.weight", shape, 0, 0, scheme, block=3)


class Odd(Method):
    """Rounds to nearest, then changes the result."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
        found: Quantized = self.change(round_to_nearest(weight, scheme, scale_dtype))
        return found


@dataclass(frozen=True)
class Means:
    """What a k-means method might return: an index into a table of means for each weight."""

    codes: Tensor
    means: Tensor
    scheme: Scheme
    notes: tuple[str, ...] = ()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.means[self.codes.long()].to(dtype)


def fails(_: Any) -> Any:
    raise ZeroDivisionError("no means\nin here")


def not_finite(q: QuantizedWeight) -> QuantizedWeight:
    return replace(q, scale=torch.full_like(q.scale, torch.nan))


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fails": (fails, "ZeroDivisionError: no means"),
    "nothing": (lambda q: None, "AttributeError"),
    "another type": (lambda q: q.dequantize(torch.float32), "AttributeError"),
    "a codebook": (
        lambda q: Means(q.codes.add(8).byte(), torch.linspace(-1, 1, 16), q.scheme),
        "codes to pack must be int8",
    ),
    "dtype of codes": (lambda q: replace(q, codes=q.codes.to(torch.int32)), "codes to pack must be int8"),
    "range of codes": (lambda q: replace(q, codes=q.codes * 4), "read back as a different weight"),
    "shape of codes": (lambda q: replace(q, codes=q.codes[:, :32], scale=q.scale[:, :1]), "gave float32 [8, 32]"),
    "dtype of scales": (lambda q: replace(q, scale=q.scale.half()), "weight_scale would be stored as float16 [8, 8]"),
    "shape of scales": (lambda q: replace(q, scale=q.scale[:, :4].contiguous()), "weight_scale"),
    "zero points": (lambda q: replace(q, zero=torch.zeros(8, 8, dtype=torch.int8)), "weight_zero_point"),
    "not finite": (not_finite, "not finite"),
    "another scheme": (lambda q: replace(q, scheme=Scheme(8, 32)), "it returned the scheme 8-bit g32"),
    "notes": (lambda q: replace(q, notes="it fell back"), "notes are not a tuple"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_stored_is_refused_by_name(kind: str) -> None:
    change, said = BAD[kind]
    items = [item(None, "kept"), item(W4), item(W4, "layers.4.mlp.first")]
    expected = "QuantizedWeight with codes int8 [8, 256], scale float32 [8, 8]"
    with_name = ("method 'kmeans'", "layers.3.mlp.first.weight (4-bit g32 symmetric)", said, expected)
    refused(lambda: try_quantizer(items, Odd(change), "kmeans", torch.float32, HOST), *with_name)


def test_every_scheme_is_tried() -> None:
    tried: list[tuple[Scheme, tuple[int, ...], torch.dtype]] = []

    class Noting(Method):
        def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats, scale_dtype: torch.dtype) -> Quantized:
            tried.append((scheme, tuple(weight.shape), weight.dtype))
            return round_to_nearest(weight, scheme, scale_dtype)

    items = [item(scheme) for scheme in (*SCHEMES, *SCHEMES)]
    state = torch.random.get_rng_state()
    try_quantizer(items, Noting(), "noting", torch.bfloat16, HOST)
    assert [scheme for scheme, _, _ in tried] == SCHEMES and {dtype for _, _, dtype in tried} == {torch.bfloat16}
    assert {shape for scheme, shape, _ in tried if scheme.group_size == 48} == {(8, 240)}
    assert {shape for scheme, shape, _ in tried if scheme.group_size == 512} == {(8, 512)}
    # A run's own random numbers are those that they were without a plan.
    assert torch.equal(torch.random.get_rng_state(), state)
    tried.clear()
    try_quantizer([item(W4, shape=(4, 64))], Noting(), "noting", torch.bfloat16, HOST)
    assert tried == [(W4, (4, 64), torch.bfloat16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_our_own_quantizers_pass(name: str, dtype: torch.dtype) -> None:
    quantizer = methods.make(Recipe(methods=(name,))).quantizer
    items = [item(scheme) for scheme in SCHEMES if quantizer.refusal(scheme) is None]
    assert items
    try_quantizer(items, quantizer, name, dtype, HOST)


def test_it_takes_milliseconds() -> None:
    quantizer = methods.make(Recipe(methods=("gptq",))).quantizer
    try_quantizer([item(Scheme())], quantizer, "gptq", torch.bfloat16, HOST)
    began = time.process_time()
    try_quantizer([item(Scheme())], quantizer, "gptq", torch.bfloat16, HOST)
    assert time.process_time() - began < 1


def test_a_plan_refuses_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, said = BAD["dtype of codes"]
    usual = methods.make

    def made(recipe: Recipe) -> methods.Pipeline:
        return replace(usual(recipe), quantizer=Odd(change))

    monkeypatch.setattr(methods, "make", made)
    ids = torch.arange(64).view(2, 32)
    refused(
        lambda: job.plan(str(tiny_model), Recipe(methods=("rtn",), scheme=W4), ids=ids),
        "method 'rtn'",
        "model.layers.0.self_attn.q_proj.weight (4-bit g32 symmetric)",
        said,
    )
