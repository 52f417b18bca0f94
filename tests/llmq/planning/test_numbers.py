"""Numbers without what gives them meaning are refused, by the weight's name; what only looks like that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq import job
from llmq.checkpoint.source import FolderSource
from llmq.errors import LlmqError
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Recipe
from llmq.streaming import block_io
from tests.conftest import write_tiny_model
from tests.llmq.planning.made import IDS, make
from tests.llmq.refusal import refused

UP = "model.layers.1.mlp.up_proj.weight"
FP8 = torch.float8_e4m3fn


def edited(model: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the model whose tensors are changed."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", None])
@pytest.mark.parametrize("weights", [UP, "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_float8_without_its_section_is_refused(
    scale: str | None, weights: str, tiny_model: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[weights] = tensors[weights].to(FP8)
        if scale:
            tensors[weights.removesuffix("weight") + scale] = torch.ones(1, 1)

    model = edited(tiny_model, tmp_path / "fp8", change)
    refused(lambda: make(model), weights, "float8_e4m3fn", "start from the unquantized model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float64, torch.float8_e5m2])
def test_other_dtypes_are_refused(dtype: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path / "odd", lambda t: t.update({UP: t[UP].to(dtype)}))
    refused(lambda: make(model), UP, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    "beside", ["weight_scale", "weight_scale_inv", "input_scale", "weight.absmax", "lora_A.default.weight", "g_idx"]
)
def test_a_weight_with_something_beside_it_is_refused(beside: str, tiny_model: Path, tmp_path: Path) -> None:
    """Also in a dtype that llmq reads: those numbers are not the whole weight."""
    name = UP.removesuffix("weight") + beside
    model = edited(tiny_model, tmp_path / "beside", lambda t: t.update({name: torch.ones(4, 4)}))
    refused(lambda: make(model), UP, name, "beside it")


@pytest.mark.parametrize("told", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_codes_in_place_of_a_weight_are_refused_with_the_file_that_explains_them(
    told: str, tiny_model: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[UP]
        tensors |= {UP.replace("weight", part): torch.zeros(8, 8, dtype=torch.int32) for part in ("qweight", "qzeros")}

    model = edited(tiny_model, tmp_path / "codes", change)
    (model / told).write_text(json.dumps({"bits": 4}))
    refused(lambda: make(model), UP, "up_proj.qweight", "in its place", told)


@pytest.mark.parametrize("told", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_such_a_file_left_beside_plain_weights_is_no_obstacle_and_is_not_copied(
    told: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = edited(tiny_model, tmp_path / "plain", lambda t: None)
    (model / told).write_text(json.dumps({"bits": 4}))
    assert make(model).schemes
    assert told not in FolderSource(model).aux_files()


def test_a_bias_that_the_config_denies_is_warned_of(tiny_model: Path, tmp_path: Path) -> None:
    name = UP.replace("weight", "bias")
    plan = make(edited(tiny_model, tmp_path / "bias", lambda t: t.update({name: torch.ones(128)})))
    assert [w for w in plan.warnings if name in w]


def test_tensors_of_no_linear_module_are_let_be(tiny_model: Path, tmp_path: Path) -> None:
    """Old checkpoints hold buffers that transformers computes, of any dtype."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.masked_bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "mtp.fc.weight": torch.ones(4, 4),
    }
    assert make(edited(tiny_model, tmp_path / "old", lambda t: t.update(extra))).schemes


@pytest.mark.parametrize("upcast", ["embed", "lm_head", "norm"])
def test_scales_have_the_dtype_of_the_blocks_weights(upcast: str, tmp_path: Path) -> None:
    """Trainers upcast embeddings, heads and norms to float32: scales stay bfloat16, 4.5 bits a weight and not 5."""
    model = write_tiny_model(tmp_path / "bf16", dtype="bfloat16")
    other = edited(model, tmp_path / "up", lambda t: t.update({n: v.float() for n, v in t.items() if upcast in n}))
    plain, changed = make(model), make(other)
    assert changed.dtype == plain.dtype == torch.bfloat16
    assert changed.bits_per_weight == plain.bits_per_weight < 4.6


def test_embeddings_larger_than_the_blocks_do_not_decide(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    wide = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8192, tie_word_embeddings=False)).bfloat16()
    wide.save_pretrained(tmp_path / "wide")
    model = edited(
        tmp_path / "wide",
        tmp_path / "up",
        lambda t: t.update({n: v.float() for n, v in t.items() if v.shape[0] > 8000}),
    )
    assert make(model).dtype == torch.bfloat16


def test_a_source_of_nothing_that_llmq_reads(tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path / "ints", lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()}))
    with pytest.raises(LlmqError, match="its weights are int8; llmq reads"):
        make(model)


def test_norms_in_double_precision_are_no_obstacle(tiny_model: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: value.double() for name, value in tensors.items() if "norm" in name}

    assert make(edited(tiny_model, tmp_path / "f64", change)).dtype == torch.float32


def test_an_adapter_that_was_not_merged_is_called_that(tiny_model: Path, tmp_path: Path) -> None:
    start = UP.removesuffix("weight")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{start}base_layer.weight"] = tensors.pop(UP)
        tensors |= {f"{start}lora_{part}.default.weight": torch.ones(4, 4) for part in "AB"}

    refused(lambda: make(edited(tiny_model, tmp_path / "a", change)), "in its place", "merge the adapter first")
    model = edited(tiny_model, tmp_path / "b", lambda t: t.update({f"{start}weight_scale": torch.ones(1)}))
    assert "merge the adapter" not in refused(lambda: make(model), "take these tensors out of the file")


K = "model.layers.1.self_attn.k_proj."
HARMLESS = {
    "k_scale": (K, "k_scale", torch.tensor(0.5)),
    "v_scale": (K.replace("k_proj", "v_proj"), "v_scale", torch.ones(1)),
    "input_scale": (K, "input_scale", torch.tensor([0.1])),
    "extra_state": (K, "_extra_state", torch.zeros(1317, dtype=torch.uint8)),
    "empty extra_state": (K, "_extra_state", torch.zeros(0, dtype=torch.uint8)),
    "fake quantization": (K, "activation_post_process.zero_point", torch.zeros(1, dtype=torch.int32)),
    "amax of inputs": (K, "input_quantizer._amax", torch.tensor(3.0)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_says_nothing_of_the_weight_beside_it_is_left_out_with_a_warning(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    start, rest, value = HARMLESS[name]
    plan = make(edited(tiny_model, tmp_path / "m", lambda t: t.update({start + rest: value})))
    assert [w for w in plan.warnings if start + rest in w and "left out" in w]
    assert start + rest not in sum(block_io.rest(plan).values(), [])
    assert start + rest not in [item.tensor for item in plan.weights]


@pytest.mark.parametrize("shape", [(), (1,), (128,), (128, 1), (1, 128)])
def test_the_largest_magnitudes_of_the_weight_are_known_by_their_value(
    shape: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    """What a quantizer noted (`weight_amax`) is no scale of the weight, whatever it is called; other numbers may be."""
    name = f"{UP}_amax"
    weight = load_file(tiny_model / "model.safetensors")[UP]
    most = (
        (weight.abs().max() if len(shape) < 2 and shape != (128,) else weight.abs().amax(1)).bfloat16().reshape(shape)
    )
    assert len(weight) == 128
    plan = make(edited(tiny_model, tmp_path / "m", lambda t: t.update({name: most})))
    assert [w for w in plan.warnings if name in w]
    other = edited(tiny_model, tmp_path / "n", lambda t: t.update({name: most / 127}))
    refused(lambda: make(other), UP, name, "beside it")


@pytest.mark.parametrize("levels", ["int8", "fp8"])
@pytest.mark.parametrize("rest", ["k_scale", "scale"])
def test_codes_that_were_cast_without_their_scale_are_refused(
    levels: str, rest: str, tiny_model: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{K}weight"].float().repeat(2, 2)[: len(tensors[f"{K}weight"])]
        scaled = weight / weight.abs().max()
        codes = (scaled * 127).round() if levels == "int8" else (scaled * 448).to(FP8)
        tensors |= {f"{K}weight": codes.float()[:, :64].contiguous(), f"{K}{rest}": torch.tensor(0.01)}

    wide = _wide(tmp_path / "wide")
    refused(lambda: make(edited(wide, tmp_path / "m", change)), f"{K}weight has {K}{rest} beside it")


def _wide(folder: Path) -> Path:
    """A model whose matrices have more numbers than 16 × 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=256, head_dim=32)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("rest", "shape"),
    [
        ("_scale", (1,)),
        ("_scale", ()),
        ("_scale_inv", (1, 1)),
        ("_scale", (64, 1)),
        ("-scales", (64, 2)),
        ("_z", (64,)),
    ],
)
def test_a_scale_beside_the_module_is_refused(
    rest: str, shape: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    """As `q_proj_scale`, which is no part of `q_proj` by its name."""
    name = f"model.layers.0.self_attn.q_proj{rest}"
    model = edited(tiny_model, tmp_path / "m", lambda t: t.update({name: torch.full(shape, 0.01)}))
    refused(lambda: make(model), f"model.layers.0.self_attn.q_proj.weight has {name} beside it")


def test_other_names_that_begin_alike_are_let_be(tiny_model: Path, tmp_path: Path) -> None:
    start = "model.layers.0.self_attn.q_proj"
    extra = {
        f"{start}2": torch.ones(1),  # another name
        f"{start}_norm.weight": torch.ones(64),  # another module's
        f"{start}_table": torch.ones(3, 64, 2),  # no scales of this weight have this shape
    }
    plan = make(edited(tiny_model, tmp_path / "m", lambda t: t.update(extra)))
    assert not [w for w in plan.warnings if start in w]
    assert extra.keys() <= set(sum(block_io.rest(plan).values(), []))
    plan = make(edited(tiny_model, tmp_path / "n", lambda t: t.update({f"{start}_bias": torch.ones(64)})))
    assert [w for w in plan.warnings if f"does not use {start}_bias" in w]


def test_what_is_left_out_does_not_take_the_name_of_what_is_written(tiny_model: Path, tmp_path: Path) -> None:
    """A scale of inputs that lies beside plain weights, and the scheme's own of the same name."""
    left = {f"model.layers.{i}.self_attn.{n}_proj.input_scale": torch.tensor([0.125]) for i in range(3) for n in "qkv"}
    model = edited(tiny_model, tmp_path / "m", lambda t: t.update(left))
    scheme = Scheme(8, None, activations=Activations(dynamic=False))
    for source, out in ((model, tmp_path / "a"), (tiny_model, tmp_path / "b")):
        job.quantize(str(source), tmp_path / out, Recipe(scheme=scheme, methods=("rtn",)), ids=IDS)
    (mine,), (plain,) = (list((tmp_path / name).glob("*.safetensors.index.json")) for name in "ab")
    assert json.loads(mine.read_text())["weight_map"].keys() == json.loads(plain.read_text())["weight_map"].keys()
    for file in (tmp_path / "b").glob("*.safetensors"):
        mine_of = load_file(tmp_path / "a" / file.name)
        assert all(torch.equal(mine_of[name], value) for name, value in load_file(file).items())
