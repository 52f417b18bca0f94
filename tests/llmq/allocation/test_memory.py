"""The bytes of weights against layers that were really packed, and the arithmetic of a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq import job
from llmq.allocation import memory
from llmq.allocation.chunks import chunk_of
from llmq.allocation.groups import groups_of
from llmq.allocation.memory import Line, budget, fixed_lines, group_bytes, weight_bytes
from llmq.allocation.prefill import prompt
from llmq.errors import LlmqError
from llmq.grids.scheme import Activations, Scheme
from llmq.inference.layer import QuantLinear
from llmq.planning.weights import stored_bytes
from llmq.recipe.recipe import Recipe
from llmq_kernels.codebook_linear import codebooks
from llmq_kernels.int_linear import layouts
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedLevels
from tests.architectures.tiny import make
from tests.conftest import write_tiny_model

MIB = 1 << 20
IDS = torch.arange(64).view(2, 32)


def held(layer: QuantLinear) -> int:
    """The bytes of a loaded layer, without its bias."""
    return sum(buffer.nbytes for name, buffer in layer.named_buffers() if name != "bias")


INTEGERS = (
    Scheme(2, 32),
    Scheme(3, 32, symmetric=False),
    Scheme(3, None),
    Scheme(4, 16),
    Scheme(4, 64, symmetric=False),
    Scheme(5, 32),
    Scheme(6, 32, symmetric=False),
    Scheme(8, None),
    Scheme(8, 32),
    Scheme(8, None, activations=Activations()),
    Scheme(8, None, activations=Activations(dynamic=False)),
    Scheme(8, None, grid="fp8", activations=Activations()),
    Scheme(7, 96),
    Scheme(2, None, symmetric=False),
)
FOLDERS = {
    "integers": INTEGERS,
    "nf4": (Scheme(4, 64, grid="nf4"),) * 14,
    "nf4-double": (Scheme(4, 64, grid="nf4", double_quant=True),) * 14,
}
PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
NAMES = [f"model.layers.{index}.{part}" for index in range(2) for part in PARTS]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # Heads of which one has fewer rows than the operator's blocks of 64; 192 is what groups of 96 divide.
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_key_value_heads": 1, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("memory")
    return {d: write_tiny_model(folder / d, layers=2, dtype=d, **sizes) for d in ("bfloat16", "float32")}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_takes_what_the_loaded_layer_holds(
    kind: str, dtype: torch.dtype, sources: dict[str, Path], tmp_path: Path
) -> None:
    schemes = dict(zip(NAMES, FOLDERS[kind], strict=True))
    overrides = tuple(schemes.items()) if kind == "integers" else ()
    recipe = Recipe(
        methods=("nf4" if "nf4" in kind else "rtn",),
        scheme=FOLDERS[kind][0],
        overrides=overrides,
        loader="transformers",
    )
    job.quantize(str(sources[str(dtype).removeprefix("torch.")]), tmp_path / "out", recipe, ids=IDS)
    model = llmq.load(tmp_path / "out", device_map="cpu")
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert held(layer) == weight_bytes(scheme, (layer.out_features, layer.in_features), dtype), scheme


def test_a_folder_in_fp8_is_dense_once_it_runs(sources: dict[str, Path], tmp_path: Path) -> None:
    scheme, shape = Scheme(8, None, grid="fp8"), (384, 192)
    job.quantize(str(sources["bfloat16"]), tmp_path / "out", Recipe(methods=("rtn",), scheme=scheme), ids=IDS)
    model = llmq.load(tmp_path / "out", device_map="cpu")
    with torch.inference_mode():
        model(IDS)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.shape == shape and weight.nbytes == weight_bytes(scheme, shape, torch.bfloat16)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", layouts.NAMES)
def test_layouts_know_their_bytes(name: str, bits: int, asymmetric: bool) -> None:
    rows, width, group = 96, 320, 32
    if (name, bits == 8) in (("int4pack", True), ("int8pack", False)):
        pytest.skip("not that many bits")
    words = torch.zeros(rows, -(-width * bits // 32), dtype=torch.int32)
    scale = torch.ones(rows, width // group, dtype=torch.bfloat16)
    zero = torch.ones_like(scale, dtype=torch.int8) if asymmetric else None
    plain = layouts.PackedInt(words, scale, zero, bits, rows, width, group)
    packed = layouts.layout(name).pack(plain, torch.bfloat16)
    nbytes = layouts.layout(name).nbytes(torch.bfloat16, bits, rows, width, group, asymmetric)
    assert sum(tensor.nbytes for tensor in packed.tensors if tensor is not None) == nbytes


def test_on_a_gpu_few_bits_are_few_bytes_and_vllm_keeps_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape, numbers = (1024, 1024), 1024 * 1024
    on_gpu = [8 * weight_bytes(Scheme(b, 128), shape, torch.bfloat16, "cuda") / numbers for b in (2, 3, 4, 6, 8)]
    assert on_gpu == [b + 16 / 128 for b in (2, 3, 4, 8, 8)]
    on_cpu = [8 * weight_bytes(Scheme(b, 128), shape, torch.bfloat16, "cpu") / numbers for b in (2, 3, 4)]
    assert on_cpu == [4 + 32 / 128] * 3
    # 48 is no multiple of 32, so the plain form is kept.
    assert weight_bytes(Scheme(4, 48), (64, 96), torch.bfloat16, "cuda") == 64 * (48 + 2 * 2)
    stored = stored_bytes(shape, Scheme(3, 128), torch.bfloat16)
    assert weight_bytes(Scheme(3, 128), shape, torch.bfloat16, "cuda", "vllm") == stored
    assert weight_bytes(None, shape, torch.bfloat16) == 2 * numbers


def test_on_a_gpu_codebooks_take_what_their_layout_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows, width = 8, 192
    codes = torch.zeros(rows * width // 2, dtype=torch.uint8)
    entries = torch.linspace(-1, 1, 16)

    def of(packed: PackedInt) -> int:
        held = (packed.packed, packed.scale, packed.codebook, packed.tables)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    blocks = PackedCodebook(codes, torch.ones(rows * width // 64), entries, None, None, 0.0, rows, width, 64)
    for scheme in (
        Scheme(4, 64, grid="nf4", double_quant=True),
        Scheme(4, 64, grid="nf4"),
        Scheme(4, 64, grid="apot"),
    ):
        assert weight_bytes(scheme, (rows, width), torch.bfloat16, "cuda") == of(codebooks.of_blocks(blocks)), scheme
    levels = PackedLevels(codes.view(rows, -1), entries.expand(rows, -1).contiguous(), rows, width)
    for bits in (2, 3, 4):
        wanted = weight_bytes(Scheme(bits, None, grid="kmeans"), (rows, width), torch.bfloat16, "cuda")
        assert wanted == of(codebooks.of_levels(levels))
    # Blocks that do not divide a row stay as they are stored, and so do packed signs, of which there is no kernel.
    for scheme in (Scheme(4, 64, grid="nf4"), Scheme(2, 64, grid="ternary", packing="llmq")):
        assert weight_bytes(scheme, (rows, 96), torch.bfloat16, "cuda") == weight_bytes(
            scheme, (rows, 96), torch.bfloat16
        )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that measures an empty one."""
    monkeypatch.setattr(memory, "own_share", lambda module: 500 * MIB)


def plan(folder: Path, **more: Any) -> Any:
    return job.plan(str(folder), Recipe(methods=("rtn",), scheme=Scheme(4, 32), **more), ids=IDS)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("overrides", [(), (("down_proj", Scheme(8, 32)),)])
def test_the_lines_and_the_chosen_weights_are_the_loaded_model(overrides: Any, tmp_path: Path) -> None:
    # Tied: one matrix is the embedding and the head.
    made = plan(make("gemma2", tmp_path / "source"), overrides=overrides)
    assert made.model.config.tie_word_embeddings
    lines = {line.what: line.nbytes for line in fixed_lines(made, "cpu", 32)}
    groups = groups_of(made.weights, made.recipe, [Scheme(4, 32)], made.dtype)
    chosen = sum(group_bytes(group, made.dtype)[0] for group in groups)
    job.quantize(str(tmp_path / "source"), tmp_path / "out", made.recipe, ids=IDS)
    model = llmq.load(tmp_path / "out", device_map="cpu")
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    parts = ("embedding", "other weights that are not quantized", "weights with a scheme of their own")
    assert chosen + sum(lines.get(part, 0) for part in parts) == pytest.approx(sum(tensors.values()), abs=512)
    assert ("weights with a scheme of their own" in lines) == bool(overrides)


@pytest.mark.usefixtures("quick")
def test_lines_by_context_device_and_runtime(tmp_path: Path) -> None:
    made = plan(write_tiny_model(tmp_path / "m"))
    short, long = (sum(line.nbytes for line in fixed_lines(made, "cpu", n)) for n in (64, 1 << 16))
    assert short < long
    assert fixed_lines(made, "cpu", 64, batch=1024)[0].nbytes > MIB
    assert any("vLLM" in line.what for line in fixed_lines(made, "cuda", 64, runtime="vllm"))
    on_gpu = fixed_lines(made, "cuda", 64)
    assert any("CUDA" in line.what for line in on_gpu) and not any("heap" in line.what for line in on_gpu)
    assert [line.nbytes for line in on_gpu] == sorted((line.nbytes for line in on_gpu), reverse=True)


@pytest.mark.usefixtures("quick")
def test_only_vllm_keeps_a_rounded_cache_in_fewer_bytes(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", dtype="bfloat16")

    def kept(runtime: memory.Runtime, **more: str) -> int:
        made = job.plan(str(folder), Recipe(scheme=Scheme(4, 32), **more), ids=IDS)
        lines = fixed_lines(made, "cuda", 64, runtime=runtime)
        return next(line.nbytes for line in lines if "what the model keeps" in line.what)

    assert kept("vllm") == kept("llmq") == kept("llmq", kv_cache="fp8") == 2 * kept("vllm", kv_cache="fp8")
    # Three layers, two heads of 16 numbers each for a key and a value.
    assert kept("vllm", kv_cache="fp8") == 3 * 64 * 2 * 2 * 16


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("kind", "share"), [("llama", memory.FRAGMENTS), ("qwen3_moe", memory.ROUTED_FRAGMENTS)])
def test_the_heap_of_routed_experts_has_more_holes(kind: str, share: float, tmp_path: Path) -> None:
    made = plan(make(kind, tmp_path / "source"))
    lines = {line.what: line.nbytes for line in fixed_lines(made, "cpu", 64)}
    assert lines["free pieces of the heap between them"] == int(share * prompt(made.model, 64).heap)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_in_chunks_the_free_pieces_follow_the_activations(kind: str, tmp_path: Path) -> None:
    made = plan(make(kind, tmp_path / "source"))
    if chunk_of(made, 2048) is None:
        pytest.skip("an older transformers, where prompts are read at once")
    lines = {line.what: line.nbytes for line in fixed_lines(made, "cpu", 2048)}
    needs = prompt(made.model, 2048, chunk=512)
    assert needs.kept == needs.cache < needs.heap
    most = 1.5 * (needs.heap - needs.kept) + 0.1 * needs.kept if kind == "llama" else 1.2 * needs.heap
    assert lines["free pieces of the heap between them"] == int(most)
    assert lines["activations of a prompt read 512 tokens at a time"] > memory.WORKSPACE


def test_what_is_left() -> None:
    lines = [Line("cache", 300 * MIB), Line("Python", 400 * MIB)]
    assert budget(lines, 1024 * MIB) == 324 * MIB
    assert budget(lines, 1024 * MIB, 324 * MIB) == 324 * MIB


def test_a_limit_that_cannot_be_met_is_refused_with_the_one_that_can() -> None:
    lines = [Line("cache", 300 * MIB), Line("Python", 400 * MIB)]
    with pytest.raises(LlmqError) as refused:
        budget(lines, 600 * MIB, 99 * MIB + 1)
    text = str(refused.value)
    assert "--fit 600.0 MiB cannot be met" in text and "--fit 800MiB" in text
    assert text.index("400.0 MiB  Python") < text.index("300.0 MiB  cache") < text.index("99.0 MiB  the weights")
    assert "--context" in text and "--batch" in text
    assert budget(lines, 800 * MIB, 99 * MIB + 1) >= 99 * MIB
