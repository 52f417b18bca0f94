"""A block's experts as one row: against numpy's quantiles, and a run whose routing is counted again by hooks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmq import formats, job
from llmq.discovery.experts import Routed
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq.report.experts import experts_of, grouped, place, quantile, shapes
from llmq.report.report import Report
from llmq.report.rows import WeightRow
from llmq.streaming import mixture
from tests.llmq.report.page.reports import report

EXPERTS = 16


@dataclass(frozen=True)
class Item:
    """What a weight has to be grouped by."""

    name: str
    block: int | None = 0
    expert: int | None = None


def test_the_experts_of_a_block_stand_where_the_first_of_them_stands() -> None:
    a, b = Item("l.0.a"), Item("l.0.b")
    first = [Item(f"l.0.e.{i}.up", 0, i) for i in range(2)]
    second = [Item(f"l.1.e.{i}.up", 1, i) for i in range(2)]
    assert grouped([a, *first, b, *second, first[0]]) == [a, [*first, first[0]], b, second]
    assert grouped([a, b]) == [a, b] and grouped([]) == []


@pytest.mark.parametrize(
    ("names", "numbers", "expected"),
    [
        (["m.l.0.experts.0.up", "m.l.0.experts.10.up", "m.l.0.experts.9.down"], [0, 10, 9], "m.l.0.experts"),
        (["m.l.0.up.experts.0", "m.l.0.down.experts.0", "m.l.0.up.experts.1"], [0, 0, 1], "m.l.0"),
        (["m.l.3.moe.3.w1", "m.l.3.moe.3.w2"], [3, 3], "m.l.3.moe.3"),
        (["a.0", "b.1"], [0, 1], ""),
    ],
)
def test_the_place_of_experts_is_what_their_names_begin_with(
    names: list[str], numbers: list[int], expected: str
) -> None:
    items = [Item(name, 0, number) for name, number in zip(names, numbers, strict=True)]
    assert place(items) == place(items[::-1]) == expected


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 768])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_quantiles_are_values_that_occur(count: int, share: float) -> None:
    values = [random.Random(count).uniform(0, 1) for _ in range(count)]
    assert quantile(values, share) == np.quantile(values, share, method="inverted_cdf")


def test_what_is_not_a_number_is_the_largest() -> None:
    values = [math.nan, 1.0, 3.0, math.inf]
    assert math.isnan(quantile(values, 1.0)) and quantile(values, 0.75) == math.inf and quantile(values, 0.5) == 3.0


def test_shapes_are_told_once() -> None:
    assert shapes([(2, 3), (3, 2), (2, 3)]) == "2×3, 3×2"
    assert shapes([(i, 1) for i in range(5)], " × ") == "0 × 1, 1 × 1, 2 × 1 and 2 more"


def test_the_row_of_a_block() -> None:
    made = report(3, experts=16, routed=True)
    found = experts_of(made)
    assert [(e.block, e.place) for e in found] == [(i, f"model.layers.{i}.mlp.experts") for i in range(3)]
    one = found[2]
    rows = [row for row in made.quantized if row.name.startswith("model.layers.2.mlp.")]
    assert one.rows == rows and len(one.each) == 16 and one.routing == made.blocks[2].routing
    errors = [row.error for row in rows]
    assert one.errors == tuple(np.quantile(errors, (0.5, 0.9, 1.0), method="inverted_cdf"))
    assert one.tokens == (0, 21, 45) and one.idle == 1
    tokens, error = one.each[7]
    assert tokens == 21 and error == pytest.approx(np.mean([r.error for r in rows if ".7." in r.name]))
    assert one.bits == pytest.approx(8 * 33 / 64)


def test_reports_without_experts_and_without_their_tokens() -> None:
    assert experts_of(report(2)) == [] == experts_of(report(2, experts=4))
    made = report(1, experts=4, routed=True)
    made.weights = [replace(r, tokens=None, alpha=None) if isinstance(r, WeightRow) else r for r in made.weights]
    (one,) = experts_of(made)
    assert one.tokens is None and one.idle == 0 and len(one.each) == 4


def test_agreement_counts_choices_in_any_order() -> None:
    def routed(choices: list[list[int]]) -> Routed:
        made = torch.tensor(choices)
        return Routed(torch.zeros(len(made), 1), made, torch.ones(made.shape))

    before = [routed([[0, 1], [2, 3]]), routed([[4, 5]])]
    assert mixture.agreement(before, before) == 1
    assert mixture.agreement(before, [routed([[1, 0], [3, 4]]), routed([[0, 1]])]) == pytest.approx(3 / 6)


def tiny(folder: Path, **changes: Any) -> Path:
    """A random mixture with 2 blocks of EXPERTS experts, 2 for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 256, "head_dim": 16, "initializer_range": 0.2, "norm_topk_prob": True}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes), tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def chosen(folder: Path, ids: torch.Tensor, changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """The experts that each token chooses in the first block, with some of the model's parameters changed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(changes, strict=False)
    assert not unexpected and len(missing) + len(changes) == len(model.state_dict())
    seen: list[torch.Tensor] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        model(ids)
    return seen[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor, Report]:
    """A mixture quantized to 2 bits, so that routing changes, with so few tokens that some experts have none."""
    folder = tmp_path_factory.mktemp("mixture")
    source = tiny(folder / "source")
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(methods=("gptq",), scheme=Scheme(2, 16), options={"correct": "none"})
    made = job.quantize(str(source), folder / "out", recipe, ids=ids)
    return source, folder / "out", ids, made


@pytest.mark.slow
def test_a_run_tells_of_every_expert(run: tuple[Path, Path, torch.Tensor, Report]) -> None:
    source, out, ids, made = run
    found = experts_of(made)
    assert [len(e.rows) for e in found] == [3 * EXPERTS] * 2 and [len(e.each) for e in found] == [EXPERTS] * 2
    for experts in found:
        assert sum(tokens or 0 for tokens, _ in experts.each) == 2 * ids.numel()
        for row in experts.rows:
            assert row.tokens is not None and row.alpha == pytest.approx(row.tokens / (row.tokens + 32))
            assert f".experts.{row.expert}." in row.name
            assert (row.notes == (mixture.STOOD_IN,)) == (row.tokens == 0)
    assert Report.load(out) == made
    order = [".experts." in row.name for row in made.quantized if row.block == 0]
    assert order == [False] * 4 + [True] * 3 * EXPERTS


@pytest.mark.slow
def test_routing_is_that_of_the_block_whose_other_weights_are_quantized(
    run: tuple[Path, Path, torch.Tensor, Report],
) -> None:
    from safetensors.torch import load_file

    source, out, ids, made = run
    written = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    changes = {}
    for row in made.quantized:
        if row.expert is None and row.block == 0:
            kind = formats.of(row.scheme)
            parts = {name: written[f"{row.name}.{name}"] for name in kind.spec(row.shape, row.scheme, torch.float32)}
            changes[f"{row.name}.weight"] = kind.unpack(parts, row.scheme).dequantize(torch.float32)
    assert len(changes) == 4
    before, after = chosen(source, ids, {}), chosen(source, ids, changes)
    same = [len({*a} & {*b}) for a, b in zip(before.tolist(), after.tolist(), strict=True)]
    assert made.blocks[0].routing == pytest.approx(sum(same) / before.numel())
    assert sum(same) < before.numel()
    counts = torch.bincount(after.flatten(), minlength=EXPERTS).tolist()
    assert [tokens for tokens, _ in experts_of(made)[0].each] == counts
