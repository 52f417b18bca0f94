"""A simulated cache in `llmq eval`: whose scales it has is in the model's name, and the base stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch

import llmq
from llmq.grids.cache import Cache
from llmq.grids.scheme import Scheme
from llmq.recipe.recipe import Recipe
from llmq_eval.evaluation import evaluate
from llmq_eval.options import Options
from tests.llmq.refusal import refused

IDS = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))


def kl(found: list[llmq.Report], model: str) -> float:
    (one,) = [result for result in found if Path(result.model).name == model]
    return one.find("divergence:words.txt", "kl").value


def test_the_damage_of_a_cache_is_measured_with_the_folders_scales_or_with_its_own(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(("rtn",), Scheme(8, 32), kv_cache="fp8")
    llmq.quantize(str(tiny_model), tmp_path / "out", recipe, ids=IDS)
    options = {
        "tasks": ("divergence",), "text": str(text_file), "window": 32, "max_windows": 2, "progress": False,
        "out": tmp_path / "eval",
    }  # fmt: skip
    told: list[str] = []
    models = [str(tmp_path / "out"), str(tiny_model)]
    found = evaluate(models, str(tiny_model), Options(**options, cache=Cache.named("fp8")), told.append)
    mine, other = "out [fp8 cache, its own scales]", "tiny [fp8 cache, scales per window]"
    assert {Path(one.model).name for one in found} == {mine, other, "tiny"}
    assert kl(found, mine) > 0 and kl(found, other) > 0
    assert sum("keys and values of 3 layers" in note for note in told) == 2
    plain = evaluate([str(tiny_model)], str(tiny_model), Options(**options))
    assert kl(plain, "tiny") == 0
    coarse = evaluate([str(tmp_path / "out")], str(tiny_model), Options(**options, cache=Cache.named("int8")))
    assert kl(coarse, "out [int8 cache, scales per window]") != kl(found, mine)
    timed = Options(tasks=("speed",), cache=Cache.named("fp8"))
    refused(lambda: evaluate([str(tiny_model)], None, timed), "speed", "--kv-cache")
