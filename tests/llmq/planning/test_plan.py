"""The plan: what becomes of each weight, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmq import job
from llmq.discovery.reasons import Kind
from llmq.errors import LlmqError
from llmq.grids.scheme import Scheme
from llmq.methods.rtn import RTN
from llmq.planning import plan as plan_module
from llmq.planning.memory import Load
from llmq.planning.plan import Plan
from llmq.planning.weights import matches
from llmq.recipe.recipe import Recipe
from tests.conftest import write_tiny_model
from tests.llmq.refusal import refused

IDS = torch.arange(64).view(2, 32)
ANY = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 64 and 172: no usual group size divides 172."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "ragged", intermediate_size=172)


def make(model: Path, bits: int = 4, group: int | None = 32, tp: int = 1, **recipe: Any) -> Plan:
    return job.plan(str(model), Recipe(scheme=Scheme(bits, group), **recipe), ids=IDS, tp=tp)


def scheme_of(plan: Plan, name: str = ANY) -> Scheme | None:
    return next(item.scheme for item in plan.weights if item.name == name)


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


@pytest.mark.parametrize(
    ("ragged", "scheme"), [("smaller", Scheme(4, None)), ("channel", Scheme(4, None)), ("keep", None)]
)
def test_ragged(ragged: str, scheme: Scheme | None, ragged_model: Path) -> None:
    plan = make(ragged_model, ragged=ragged)
    assert scheme_of(plan) == scheme
    assert scheme_of(plan, "model.layers.1.mlp.up_proj") == Scheme(4, 32)


def test_ragged_takes_the_largest_divisor(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", intermediate_size=144)
    assert scheme_of(make(model, group=64, ragged="smaller")) == Scheme(4, 48)


def test_ragged_is_refused_by_name(ragged_model: Path) -> None:
    with pytest.raises(LlmqError, match=r"down_proj \[64, 172\] .* in blocks 0–2.*--ragged smaller"):
        make(ragged_model)


def test_override_and_keep(tiny_model: Path) -> None:
    plan = make(tiny_model, overrides=(("down_proj", Scheme(8, 64)),), keep=("re:layers\\.0\\.",))
    assert scheme_of(plan) == Scheme(8, 64)
    assert all(i.scheme is None and "--keep" in str(i.reason) and i.by_user for i in plan.weights if i.block == 0)
    assert not [w for w in plan.warnings if "share an input" in w]


def test_a_weight_left_alone_has_a_kind_of_reason(ragged_model: Path) -> None:
    plan = make(ragged_model, ragged="keep", keep=("q_proj",))
    kinds: dict[Kind, set[str]] = {}
    for item in plan.weights:
        assert (item.scheme is None) == (item.reason is not None)
        if item.reason is not None:
            kinds.setdefault(item.reason.kind, set()).add(item.name.rpartition(".")[2])
    assert kinds == {
        Kind.BY_USER: {"q_proj"},
        Kind.INDIVISIBLE: {"down_proj"},
        Kind.OUTSIDE: {"embed_tokens", "lm_head"},
    }
    # What the user leaves alone may be overridden in vain; what cannot be quantized may not.
    assert make(ragged_model, ragged="keep", keep=("q_proj",), overrides=(("q_proj", Scheme(8, 32)),))
    refused(
        lambda: make(ragged_model, ragged="keep", overrides=(("lm_head", Scheme(8, 32)),)),
        "only weights that are not quantized",
    )


def test_splitting_what_servers_fuse_is_warned_of(tiny_model: Path) -> None:
    plan = make(tiny_model, overrides=(("up_proj", Scheme(8, 32)),))
    assert [w for w in plan.warnings if "share an input" in w]


def test_tensor_parallel(tiny_model: Path) -> None:
    assert make(tiny_model, tp=2)
    refused_text = str(pytest.raises(LlmqError, make, tiny_model, tp=4, group=64).value)
    assert "o_proj" in refused_text and "--tp 4" in refused_text
    assert "q_proj" not in refused_text  # its output is split, not its input


def test_too_little_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    with pytest.raises(LlmqError, match="of memory and .* are free"):
        make(tiny_model)


def test_too_little_disk(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    refused(lambda: job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32)), ids=IDS, out=tmp_path / "o"), "on disk")


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


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("down_proj", ANY, True),
        ("mlp.down_proj", ANY, True),
        ("own_proj", ANY, False),
        ("layers.1", ANY, True),
        ("layers.1", "model.layers.11.mlp.down_proj", False),
        ("*down*", ANY, True),
        ("down*", ANY, False),
        (r"re:layers\.[0-1]\.", ANY, True),
        (r"re:^layers", ANY, False),
    ],
)
def test_patterns(pattern: str, name: str, hit: bool) -> None:
    assert matches(pattern, name) is hit


def test_a_method_says_which_schemes_are_not_for_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: make(tiny_model, methods=("nf4",)), "'nf4'", "it rounds to the grid 'nf4', not to 4-bit g32")
    monkeypatch.setattr(RTN, "refusal", lambda self, scheme: f"it never liked {scheme}" if scheme.bits == 3 else None)
    assert make(tiny_model, methods=("rtn",))
    refused(lambda: make(tiny_model, 3, methods=("rtn",)), "method 'rtn': it never liked 3-bit g32", "another scheme")
