"""What a plan says of itself: its blocks' units, what is outside of them, who can read what is written."""

from __future__ import annotations

from pathlib import Path

from llmq import job
from llmq.formats.stacks import ALONE
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.types import DENSE
from llmq.recipe.recipe import Recipe
from tests.llmq import classes, mixtures
from tests.llmq.planning.made import IDS, make


def test_units_of_a_block_end_with_its_own(tiny_model: Path, tmp_path: Path) -> None:
    assert [block.units for block in make(tiny_model).blocks] == [[f"block {i}"] for i in range(3)]
    plan = job.plan(str(mixtures.write("qwen3_moe", tmp_path, num_experts=20)), Recipe(scheme=Scheme(4, 16)), ids=IDS)
    assert plan.blocks[0].units == ["block 0, experts 0–15", "block 0, experts 16–19", "block 0"]
    assert plan.blocks[0].streamed and not plan.blocks[0].streamed & plan.blocks[0].stored


def test_what_is_outside_and_quantized(tiny_model: Path) -> None:
    assert make(tiny_model).outside == {}
    plan = make(tiny_model, include=("lm_head",))
    assert {tensor: item.name for tensor, item in plan.outside.items()} == {"lm_head.weight": "lm_head"}
    chosen = [item for item in plan.weights if item.scheme is not None]
    numbers = sum(item.shape[0] * item.shape[1] for item in chosen)
    assert plan.bits_per_weight == 8 * sum(item.after for item in chosen) / numbers


def test_windows_of_a_pass(tiny_model: Path) -> None:
    plan = make(tiny_model)
    assert plan.batch == 2048 // plan.ids.shape[1]


def test_who_reads_it(tiny_model: Path, tmp_path: Path) -> None:
    assert {loader.code for loader in make(tiny_model).loaders} == {"transformers", "vllm"}
    folder = classes.write("bert", tmp_path)

    def loaders(scheme: Scheme) -> list[str]:
        plan = job.plan(str(folder), Recipe(methods=("rtn",), scheme=scheme, model_class="AutoModel"))
        assert not plan.for_llmq_alone and ALONE not in plan.loaders
        return [loader.sentence for loader in plan.loaders]

    assert loaders(Scheme(4, 32)) == [DENSE.sentence]
    (packed,) = loaders(Scheme(8, None, activations=Activations()))
    assert "stock transformers" in packed and "while loading" not in packed
