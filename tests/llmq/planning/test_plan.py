"""The plan: what becomes of each weight, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq import job
from llmq.discovery import blocks as discover
from llmq.grids.scheme import Scheme
from llmq.planning import plan as plan_module
from llmq.planning.memory import Load
from llmq.recipe.recipe import Calibration, Recipe
from tests.conftest import write_tokenizer
from tests.llmq.planning.made import make
from tests.llmq.refusal import refused


def test_everything_is_accounted_for(tiny_model: Path) -> None:
    plan = make(tiny_model)
    assert {i.name for i in plan.weights if i.scheme} == {
        f"model.layers.{layer}.{part}"
        for layer in range(3)
        for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    }
    assert {i.name: str(i.reason) for i in plan.weights if not i.scheme} == {
        "model.embed_tokens": "outside the decoder blocks",
        "lm_head": "outside the decoder blocks",
    }
    assert sum(i.before for i in plan.weights) <= plan.source.total_bytes
    assert plan.bits_per_weight == pytest.approx(4 + 32 / 32 + 128 / (64 * 64), abs=0.05)  # float32 scales, the shapes


def test_rtn_needs_no_text(tiny_model: Path) -> None:
    assert "none needed" in make(tiny_model, methods=("rtn",)).calibration.description
    assert (
        "none needed" not in make(tiny_model, methods=("rtn",), options={"range": "weighted"}).calibration.description
    )


class Wide:
    """A statistic of a known size."""

    size = 0

    def __init__(self, width: int, device: torch.device) -> None: ...

    def update(self, x: torch.Tensor) -> None: ...

    @classmethod
    def nbytes(cls, width: int) -> int:
        return cls.size * width


class Wider(Wide):
    """Another one."""

    size = 5_000


@pytest.mark.parametrize("part", ["transform", "quantize", "refine"])
def test_the_statistics_of_every_part_are_budgeted(
    part: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget has the largest pass of statistics: they are never held together."""
    made = make(tiny_model, methods=("smoothquant", "rtn", "signround"))
    made.pipeline.transforms[0].transform_needs = ()
    made.pipeline.quantizer.quantize_needs = ()
    loads: list[list[Load]] = []
    monkeypatch.setattr(plan_module, "predict", lambda *args, **more: loads.append(args[5]) or made.budget)
    plan_module._budget(made, "cpu")
    methods = {
        "transform": made.pipeline.transforms[0],
        "quantize": made.pipeline.quantizer,
        "refine": made.pipeline.refiners[0],
    }
    for one, method in methods.items():
        setattr(method, f"{one}_needs", (Wider,) if one == part else (Wide,))
    plan_module._budget(made, "cpu")
    widths = {item.input_id: item.shape[1] for item in made.blocks[0].weights.values()}
    assert [load.statistics for load in loads[0]] == [0, 0, 0]
    assert [load.statistics for load in loads[1]] == [5_000 * sum(widths.values())] * 3


def positions(folder: Path, kind: str, **sizes: int) -> Path:
    """A model with a table of positions, whose config has its length under another name."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=256, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


BIGCODE = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 128}
GPT2 = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4}
CTRL = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4, "dff": 128}
OPENAI = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4}
CODEGEN = {"n_positions": 48, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
LONG = {"GPTBigCode": BIGCODE, "GPT2": GPT2, "CTRL": CTRL, "OpenAIGPT": OPENAI, "CodeGen": CODEGEN}


@pytest.mark.parametrize("kind", LONG)
def test_the_longest_input_is_known_by_any_name(kind: str, tmp_path: Path) -> None:
    assert plan_module._longest(discover.build(positions(tmp_path / kind, kind, **LONG[kind]), torch.float32)) == 48


@pytest.mark.parametrize("kind", ["GPTBigCode", "CodeGen"])
def test_calibration_is_cut_to_it(kind: str, tmp_path: Path, text_file: Path) -> None:
    model = positions(tmp_path / kind, kind, **LONG[kind])
    recipe = Recipe(scheme=Scheme(4, 32), calibration=Calibration(text=str(text_file), samples=2, seqlen=512))
    assert job.plan(str(model), recipe).ids.shape == (2, 48)


def test_a_length_that_the_config_does_not_tell_is_found_out(tmp_path: Path) -> None:
    """Whisper's decoder has 64 positions, in a config that calls them targets: refused, and checked by fewer tokens."""
    sizes = {"d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
    more = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "max_target_positions": 64}
    special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "decoder_start")}
    model = positions(tmp_path / "m", "Whisper", **sizes, **more, **special)
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 32))
    assert job.plan(str(model), recipe).ids.shape == (1, 64)
    refused(
        lambda: job.plan(str(model), Recipe(scheme=Scheme(4, 32)), ids=torch.zeros(1, 65, dtype=torch.long)),
        "the model fails on windows of 65 tokens",
        "give a smaller --seqlen",
    )


def test_the_window_of_a_run_without_calibration_is_no_longer_than_asked(tiny_model: Path) -> None:
    recipe = Recipe(methods=("rtn",), scheme=Scheme(4, 32), calibration=Calibration(seqlen=24))
    assert job.plan(str(tiny_model), recipe).ids.shape == (1, 24)
