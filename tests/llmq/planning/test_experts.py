"""Experts in a plan: what loaders would misread is refused with a way out that works, the rest loads exactly."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmq import formats, job
from llmq.discovery.reasons import Kind
from llmq.discovery.view import View
from llmq.grids.scheme import Activations, Scheme
from llmq.planning.experts import check_experts, check_route
from llmq.planning.plan import Plan
from llmq.planning.weights import BY_USER
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.mixtures import W4
from tests.llmq.planning.made import item
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32, seed=2)
EIGHT = Scheme(8, 16)
EXPERT = "model.layers.0.mlp.experts.0.gate_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of four experts, stored one by one; do not change it."""
    return mixtures.write(
        "qwen3_moe", tmp_path_factory.mktemp("models") / "mixture", num_hidden_layers=2, moe_intermediate_size=64
    )


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks whose experts are stored as stacks; do not change it."""
    return mixtures.write("granitemoe", tmp_path_factory.mktemp("models") / "fused", num_hidden_layers=2)


def recipe(scheme: Scheme = W4, **more: Any) -> Recipe:
    return Recipe(methods=("rtn",), scheme=scheme, **more)


def plan(model: Path, scheme: Scheme = W4, **more: Any) -> Plan:
    return job.plan(str(model), recipe(scheme, **more), ids=IDS)


def twin(model: Path, out: Path, report: Report, folder: Path) -> Path:
    """The source with the quantized weights as a reader of their formats gives them, in the source's own layout."""
    tensors, found = mixtures.stored(model), mixtures.stored(out)
    for row in report.quantized:
        assert row.scheme is not None
        mine = {n.removeprefix(f"{row.name}."): t for n, t in found.items() if n.startswith(f"{row.name}.")}
        tensors[f"{row.name}.weight"] = formats.of(row.scheme).unpack(mine, row.scheme).dequantize(torch.float32)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def exact(model: Path, tmp_path: Path, scheme: Scheme = W4, **more: Any) -> Report:
    """Quantized, loaded by stock transformers without a word, with the logits of the dequantized weights."""
    report = job.quantize(str(model), tmp_path / "out", recipe(scheme, **more), ids=IDS)
    loaded, told = mixtures.load(tmp_path / "out")
    assert not told
    dense, told = mixtures.load(twin(model, tmp_path / "out", report, tmp_path / "twin"))
    assert not told
    before, _ = mixtures.load(model)
    got, want, original = (mixtures.logits(m) for m in (loaded, dense, before))
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert 1e-3 < float((want - original).norm() / original.norm()) < 1
    return report


def experts_in(report: Report) -> int:
    return sum(".experts." in row.name for row in report.quantized)


# Traps: each is refused by `plan`, by name, and the way out that the message gives works.

MIXED: dict[str, dict[str, Any]] = {
    "some experts at other bits": {"overrides": (("re:experts\\.[02]\\.", EIGHT),)},
    "one expert at other bits": {"overrides": (("re:layers\\.1\\..*experts\\.3\\.", EIGHT),)},
    "one layer's experts at other bits": {"overrides": (("re:layers\\.1\\..*experts", EIGHT),)},
    "down_proj at other bits": {"overrides": (("re:experts.*down_proj", EIGHT),)},
    "one expert kept": {"keep": ("re:layers\\.0\\..*experts\\.1\\.",)},
    "one weight of one expert kept": {"keep": ("model.layers.1.mlp.experts.2.up_proj",)},
    "up_proj kept": {"keep": ("up_proj",)},
    "another group size": {"overrides": (("re:experts.*down_proj", Scheme(4, 32)),)},
}


@pytest.mark.parametrize("trap", MIXED)
def test_experts_of_different_schemes_are_refused(trap: str, source: Path) -> None:
    said = refused(lambda: plan(source, **MIXED[trap]), "experts with different schemes", "--keep for all experts")
    named = re.findall(r"(\S+experts\.\d\.\w+) (\d-bit g\d+ symmetric|not quantized)", said)
    assert len(named) == 2 and len({scheme for _, scheme in named}) == 2, said
    stored = mixtures.stored(source)
    assert all(f"{name}.weight" in stored for name, _ in named)


@pytest.mark.slow
def test_the_ways_out_of_different_schemes(source: Path, tmp_path: Path) -> None:
    """Patterns that match every expert; all experts of a block kept."""
    report = exact(source, tmp_path / "every", overrides=(("experts", EIGHT),))
    assert {row.scheme for row in report.quantized if ".experts." in row.name} == {EIGHT}
    report = exact(source, tmp_path / "kept", keep=("re:layers\\.0\\..*experts",))
    assert experts_in(report) == 4 * 3


UNREADABLE = {
    "asymmetric": Scheme(4, 16, symmetric=False),
    "int8 with rounded inputs": Scheme(8, None, activations=Activations()),
    "int8 with static inputs": Scheme(8, None, activations=Activations(dynamic=False)),
    "fp8 with static inputs": Scheme(8, None, grid="fp8", activations=Activations(dynamic=False)),
    "nf4": Scheme(4, 64, grid="nf4"),
}


@pytest.mark.parametrize("trap", UNREADABLE)
def test_schemes_that_no_reader_of_experts_knows_are_refused(trap: str, source: Path) -> None:
    said = refused(lambda: plan(source, UNREADABLE[trap]), f"{EXPERT}: ", "--keep experts to leave the experts alone")
    assert len(said) < 400


@pytest.mark.slow
@pytest.mark.parametrize("trap", UNREADABLE)
def test_the_way_out_of_them(trap: str, source: Path, tmp_path: Path) -> None:
    report = job.quantize(str(source), tmp_path / "out", recipe(UNREADABLE[trap], keep=("experts",)), ids=IDS)
    assert not experts_in(report) and len(report.quantized) == 8
    if trap == "nf4":
        pytest.importorskip("bitsandbytes")
    model, told = mixtures.load(tmp_path / "out")
    assert not told
    before, _ = mixtures.load(source)
    for i in range(2):
        for name, value in before.model.layers[i].mlp.experts.named_parameters():
            assert torch.equal(model.model.layers[i].mlp.experts.get_parameter(name), value)


@pytest.mark.parametrize("scheme", [W4, EIGHT, Scheme(8, None, grid="fp8")], ids=str)
def test_experts_stored_in_one_tensor_are_refused(scheme: Scheme, fused: Path) -> None:
    said = refused(lambda: plan(fused, scheme), "stores all experts of a block in one tensor", "random numbers")
    assert said.split(":")[0] + ".weight" in mixtures.stored(fused)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "aria_text", "jetmoe", "dbrx", "inkling_text"])
def test_the_way_out_where_experts_are_stored_in_one_tensor(kind: str, tmp_path: Path) -> None:
    """What the message says after --keep, word for word."""
    model = mixtures.write(kind, tmp_path / "m")
    said = refused(lambda: plan(model), "stores all experts of a block in one tensor")
    report = exact(model, tmp_path, keep=tuple(re.findall(r"--keep (\S+)", said)))
    assert report.quantized and not any(len(row.shape) > 2 for row in report.quantized)


@pytest.mark.slow
def test_the_way_out_where_a_type_that_stores_experts_singly_has_them_in_one_tensor(
    source: Path, tmp_path: Path
) -> None:
    """Such checkpoints exist: what is stored decides, not the type."""
    shutil.copytree(source, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    model, _ = mixtures.load(source)
    state = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    said = refused(lambda: plan(tmp_path / "m"), "stores all experts of a block in one tensor", "--keep experts ")
    assert "gate_up_proj" in said
    report = exact(tmp_path / "m", tmp_path, keep=("experts",))
    assert len(report.quantized) == 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_some_matrices_of_experts_in_one_tensor_and_others_one_by_one(kind: str, tmp_path: Path) -> None:
    """Stock loads either; with packed ones beside a stack it would not find the experts' parts."""
    one = mixtures.write(kind, tmp_path / "one", num_hidden_layers=2)
    shutil.copytree(one, model := tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    stacks = {n: t.contiguous().clone() for n, t in mixtures.load(one)[0].state_dict().items() if "gate_up" in n}
    apart = {n: t for n, t in mixtures.stored(one).items() if not re.search(r"experts\.\d+\.(gate|up|w1|w3)", n)}
    save_file(apart | stacks, model / "model.safetensors", {"format": "pt"})
    told = "the checkpoint stores all experts of a block in one tensor", "--keep experts quantizes everything else"
    assert "gate_up_proj: " in refused(lambda: plan(model), *told)
    refused(lambda: plan(model, keep=("gate_up_proj",)), "stores other matrices of the block's experts in one tensor")
    report = exact(model, tmp_path, keep=("experts",))
    assert len(report.quantized) == 8


@pytest.mark.slow
def test_experts_of_one_block_in_one_tensor(source: Path, tmp_path: Path) -> None:
    """Those of the other block are quantized."""
    shutil.copytree(source, model := tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {n: t.contiguous().clone() for n, t in mixtures.load(source)[0].state_dict().items()}
    apart = {n: t for n, t in mixtures.stored(source).items() if "layers.0.mlp.experts" not in n}
    save_file(apart | {n: t for n, t in state.items() if "layers.0.mlp.experts" in n}, model / "model.safetensors")
    for kept in ((), ("re:layers\\.1\\..*experts",)):
        refused(lambda kept=kept: plan(model, keep=kept), "layers.0.mlp.experts.gate_up_proj: ", "--keep experts ")  # type: ignore[misc]
    report = exact(model, tmp_path, keep=("re:layers\\.0\\..*experts",))
    assert experts_in(report) == 4 * 3


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [1, 2, 3]}, {"num_experts": 1, "num_experts_per_tok": 1}])
def test_the_way_out_names_experts_and_no_number(changes: dict[str, Any], tmp_path: Path) -> None:
    """Where all experts are in block 0, a 0 is a part of all their names, and of its attention's."""
    model = mixtures.write("qwen3_moe", tmp_path / "m", **{"num_hidden_layers": 1} | changes)
    refused(lambda: plan(model, UNREADABLE["asymmetric"]), "--keep experts to leave the experts alone")
    made = plan(model, UNREADABLE["asymmetric"], keep=("experts",))
    assert not any(i.scheme for i in made.weights if ".experts." in i.name)
    assert all(i.scheme for i in made.weights if "self_attn" in i.name and i.name.endswith("proj"))


# What loads exactly.


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*(Scheme(bits, 16) for bits in (2, 3, 4, 8)), Scheme(8, None, grid="fp8")], ids=str)
def test_one_scheme_for_everything(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    assert experts_in(exact(source, tmp_path, scheme)) == 2 * 4 * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "nemotron_h", "longcat_flash"])
def test_all_experts_kept_where_they_are_stored_one_by_one(kind: str, tmp_path: Path) -> None:
    """They are written as stacks, under the model's names: under their own names, stock would want them packed."""
    model = mixtures.write(kind, tmp_path / "m")
    report = exact(model, tmp_path, keep=("experts",))
    assert not experts_in(report)
    assert not [n for n in mixtures.stored(tmp_path / "out") if re.search(r"experts\.\d", n)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rest", "experts"),
    [(EIGHT, W4), (W4, EIGHT), (Scheme(3, 16), Scheme(2, 16)), (Scheme(8, None, grid="fp8"), W4)],
    ids=str,
)
@pytest.mark.parametrize("few", [False, True])
def test_experts_of_one_scheme_and_the_rest_of_another(
    rest: Scheme, experts: Scheme, few: bool, source: Path, tmp_path: Path
) -> None:
    """The experts' group is the first, however few they are: stock takes the first group's scheme for them."""
    more: dict[str, Any] = {"overrides": (("experts", experts),)}
    if few:
        source = mixtures.write("qwen3_moe", tmp_path / "m", num_hidden_layers=4, mlp_only_layers=[0, 1, 2])
    report = exact(source, tmp_path, rest, **more)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = [set(section["config_groups"][f"group_{i}"]["targets"]) for i in range(2)]
    names = [{row.name for row in report.quantized if row.scheme == scheme} for scheme in (experts, rest)]
    assert all(".experts." in name for name in names[0])
    assert names[0] <= groups[0] and names[1] <= groups[1] and not groups[0] & groups[1]
    assert (len(groups[0]) < len(groups[1])) is few
    assert section["config_groups"]["group_0"]["weights"]["num_bits"] == experts.bits


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_routers_are_left_alone_by_name(kind: str, tmp_path: Path) -> None:
    model = mixtures.write(kind, tmp_path / "m")
    made = plan(model)
    ignored = job.config(made)["quantization_config"]["ignore"]
    routers = [i for i in made.weights if i.reason is not None and i.reason.kind is Kind.ROUTER]
    blocks = {i.block for i in made.weights if i.expert is not None}
    assert blocks and {i.block for i in routers} == blocks
    # By the checkpoint's name, which a server knows, and by transformers' name.
    assert {i.name for i in routers} | {i.module.removesuffix(".weight") for i in routers} <= set(ignored)
    assert all(f"{i.name}.weight" in mixtures.stored(model) for i in routers)


RAGGED = {
    # --ragged: the group size of all experts, None if they are kept; of widths 64 and 48
    "smaller": (16, False),
    "channel": (None, False),
    "keep": (None, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("ragged", RAGGED)
def test_widths_that_the_group_size_does_not_divide_leave_experts_one_scheme(ragged: str, tmp_path: Path) -> None:
    """The ways out that the refusal gives: a smaller group, or none, for all experts and for no other weight."""
    model = mixtures.write("qwen3_moe", tmp_path / "m", num_hidden_layers=2, moe_intermediate_size=48)
    scheme, (size, kept) = Scheme(4, 32), RAGGED[ragged]
    said = refused(lambda: plan(model, scheme), "does not divide the width of", "experts.*.down_proj [64, 48]")
    assert f"--ragged {ragged}" in said and "(experts 0–3)" in said and said.count("down_proj") == 1
    report = exact(model, tmp_path, scheme, ragged=ragged)
    assert {row.scheme for row in report.quantized if ".self_attn." in row.name} == {scheme}
    mine = {row.scheme for row in report.quantized if ".experts." in row.name}
    assert mine == (set() if kept else {replace(scheme, group_size=size)})
    left = [i for i in plan(model, scheme, ragged=ragged).weights if ".experts." in i.name and i.scheme is None]
    assert bool(left) is kept
    for item_left in left:
        own = "its width 48" if "down" in item_left.name else "the width 48 of others of its expert"
        assert str(item_left.reason) == f"group size 32 does not divide {own}"


def test_every_expert_of_the_checkpoint_is_planned_once_with_its_place(source: Path) -> None:
    made = plan(source)
    stored = mixtures.stored(source)
    mine = [i for i in made.weights if i.expert is not None]
    assert sorted(i.tensor for i in mine) == sorted(n for n in stored if ".experts." in n)
    for i in mine:
        assert i.shape == tuple(stored[i.tensor].shape) and f".experts.{i.expert}." in i.tensor
        assert i.row_parallel is ("down_proj" in i.tensor)
    for block in made.blocks:
        assert block.experts is not None
        (unit,) = (group.unit for group in block.experts.groups)
        assert block.units == [unit, block.unit] and unit == f"block {block.index}, experts 0–3"
        for weights in block.experts.weights:
            gate, up, down = (next(w for w in weights.values() if part in w.name) for part in ("gate_", "up_", "down_"))
            assert gate.input_id == up.input_id != down.input_id
            assert gate.view is not None and up.view is not None and gate.view.rows != up.view.rows


# The check alone.


def test_schemes_of_experts() -> None:
    experts = [item(f"x.0.experts.{e}.w{i}", scheme=W4, expert=e) for e in range(3) for i in (1, 2)]
    check_experts([*experts, item("x.0.attention", scheme=EIGHT)], recipe())
    check_experts([replace(i, scheme=None, reason=BY_USER) for i in experts], recipe())
    check_experts([], recipe())
    other = [*experts[:-1], replace(experts[-1], scheme=EIGHT)]
    refused(lambda: check_experts(other, recipe()), "x.0.experts.0.w1 4-bit", "x.0.experts.2.w2 8-bit")
    kept = [*experts[:-1], replace(experts[-1], scheme=None, reason=BY_USER)]
    refused(lambda: check_experts(kept, recipe()), "x.0.experts.2.w2 not quantized")


def test_experts_that_are_to_see_all_tokens() -> None:
    expert, dense = item("x.0.experts.1.w", scheme=W4, expert=1), item("x.0.attention", scheme=W4)
    assert not check_route([dense, expert], recipe(route="all"), True)
    assert not check_route([dense], recipe(), False)
    part = replace(expert, view=View("stack", 0))
    refused(lambda: check_route([dense, part], recipe(route="all"), True), "--route all: ", "leave --route out")
    for items in ([dense], [dense, replace(expert, scheme=None, reason=BY_USER)]):
        (warning,) = check_route(items, recipe(route="all"), True)
        assert "--route all changes nothing" in warning
    refused(lambda: check_route([expert], recipe(route="all"), False), "--route all", "'rtn'")
