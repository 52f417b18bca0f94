"""A block's weights in and out: what is filled, what is written as it was, what is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq import job
from llmq.checkpoint.sink import Sink
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.planning.plan import Plan
from llmq.recipe.recipe import Recipe
from llmq.streaming.block_io import BlockIO, rest
from tests.llmq.refusal import refused

CPU = torch.device("cpu")
IDS = torch.arange(64).view(2, 32)
RECIPE = Recipe(scheme=Scheme(4, 32), keep=("v_proj",), loader="transformers")


@pytest.fixture
def plan(tiny_model: Path) -> Plan:
    return job.plan(str(tiny_model), RECIPE, ids=IDS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_planned_block_names_its_weights_and_tensors(plan: Plan, tiny_model: Path) -> None:
    assert [block.unit for block in plan.blocks] == [f"block {i}" for i in range(len(plan.structure.blocks))]
    names = set(stored(tiny_model))
    for i, block in enumerate(plan.blocks):
        assert block.module is plan.model.get_submodule(block.name)
        assert set(block.weights) == {
            f"{owner}.weight"
            for owner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")
            + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
        }
        assert set(block.tensors) == {name for name, _ in block.module.named_parameters()}
        assert block.stored <= names
        for name, weight in block.weights.items():
            assert (weight.block, weight.tensor) == (i, *block.tensors[name])
    inside = {tensor for block in plan.blocks for tensor in block.stored}
    assert {name for unit in rest(plan).values() for name in unit} == names - inside


def test_what_is_not_quantized_is_written_as_it_was_unless_it_changed(plan: Plan, tmp_path: Path) -> None:
    io, block = BlockIO(plan, CPU, Sink(tmp_path, 0, -1)), plan.blocks[1]
    io.fill(block)
    changed = "input_layernorm.weight"
    block.module.get_parameter(changed).data += 1
    written = io.untouched(block, {changed})
    assert set(written) == {t for name, (t,) in block.tensors.items() if name not in block.weights}
    for name, (tensor,) in block.tensors.items():
        if name not in block.weights:
            assert torch.equal(written[tensor], plan.source.read(tensor) + (1 if name == changed else 0))
    # A tensor that an earlier block has too is written there.
    shared = plan.blocks[0].tensors | {"shared": block.tensors["post_attention_layernorm.weight"]}
    plan.blocks[0].tensors.update(shared)
    assert block.tensors["post_attention_layernorm.weight"][0] not in io.untouched(block, set())


def test_a_block_is_read_back_as_it_was_written(plan: Plan, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmq.quantize(str(tiny_model), out, RECIPE, ids=IDS)
    with Sink.open(out, job.fingerprint(plan, "cpu"), units=len(rest(plan)) + len(plan.blocks)) as sink:
        block = plan.blocks[2]
        states = BlockIO(plan, CPU, sink).restore(block)
        files = stored(out)
        assert [state.view.name for state in states] == list(block.weights)
        for state in states:
            scale = files[f"{state.name}.weight_scale"].float().repeat_interleave(32, 1)
            assert state.quantized is not None
            value = block.module.get_parameter(state.view.name)
            assert torch.equal(value, state.result())
            steps = value.float() / scale
            assert float((steps - steps.round()).abs().max()) < 0.05 and float(steps.abs().max()) <= 8.05
        (kept,) = block.tensors["self_attn.v_proj.weight"]
        assert torch.equal(block.module.get_parameter("self_attn.v_proj.weight"), files[kept].to(plan.dtype))


def test_a_weight_outside_the_blocks_is_rounded_written_and_read_back(tiny_model: Path, tmp_path: Path) -> None:
    made = job.plan(str(tiny_model), Recipe(scheme=Scheme(4, 32), include=("lm_head",)), ids=IDS)
    item = made.outside["lm_head.weight"]
    with Sink.open(tmp_path / "o", {}, 1) as sink:
        io = BlockIO(made, CPU, sink)
        row, tensors, values = io.round_outside(item)
        sink.commit("one", tensors, {})
        assert torch.equal(io.read_back(item), values)
    dense = stored(tiny_model)["lm_head.weight"]
    wanted = round_to_nearest(dense, Scheme(4, 32), made.dtype).dequantize(made.dtype)
    assert torch.equal(values, wanted) and tensors.keys() == {
        f"lm_head.weight_{n}" for n in ("packed", "scale", "shape")
    }
    assert (row["name"], row["block"], row["bytes"]) == ("lm_head", None, item.after)
    assert row["error"] == pytest.approx(float((wanted - dense).norm() / dense.norm()), rel=1e-5)
    assert row["notes"] == ("no calibration: rounded to nearest",)
    # What needs no data anyway has nothing to say.
    plain = job.plan(str(tiny_model), Recipe(methods=("hqq",), scheme=Scheme(4, 32), include=("lm_head",)), ids=IDS)
    row, _, hqq = BlockIO(plain, CPU, sink).round_outside(plain.outside["lm_head.weight"])
    assert row["notes"] == () and not torch.equal(hqq, values)


def test_a_damaged_weight_outside_the_blocks_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text((tiny_model / "config.json").read_text())
    made = job.plan(str(tmp_path / "m"), Recipe(scheme=Scheme(4, 32), include=("lm_head",)), ids=IDS)
    io = BlockIO(made, CPU, Sink(tmp_path, 0, -1))
    refused(lambda: io.round_outside(made.outside["lm_head.weight"]), "lm_head.weight")
