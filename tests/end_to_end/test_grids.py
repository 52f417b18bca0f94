"""Every quantizer on the grids of other formats: stock transformers gives the logits of what llmq had in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmq
from llmq import job
from llmq.block.attempt import Outcome
from llmq.grids.scheme import Activations, Scheme
from llmq.recipe.recipe import Recipe
from tests.end_to_end.test_methods import loaded, logits, quantized
from tests.llmq.blocks import apart, ids, write

NF4 = Scheme(4, 64, grid="nf4")
DOUBLE = Scheme(4, 64, grid="nf4", double_quant=True)
FP8 = Scheme(8, None, grid="fp8")
W8A8 = Scheme(8, None, grid="fp8", activations=Activations())


def recipe(method: str, scheme: Scheme) -> Recipe:
    options = {"iterations": 20} if "signround" in method or "qat" in method else {}
    return Recipe(methods=tuple(method.split("+")), scheme=scheme, options=options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("models") / "source")


# With a second quantization of the scales, only what chooses scales itself: awq's are those of rtn.
CASES = [(m, NF4) for m in ("gptq", "awq", "hqq", "gptq+signround")]
CASES += [("gptq", FP8), ("hqq", FP8), ("awq", W8A8), ("signround", W8A8), ("gptq+signround", W8A8)]
CASES += [(m, DOUBLE) for m in ("gptq", "hqq", "signround")]
TERNARY, BINARY = (Scheme(2, 32, grid=name) for name in ("ternary", "binary"))
CASES += [("hqq", TERNARY), ("gptq+signround", TERNARY), ("gptq+block_qat", BINARY)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), CASES, ids=str)
def test_stock_transformers_reads_what_every_quantizer_writes(
    method: str, scheme: Scheme, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, memory = quantized(source, tmp_path / "out", recipe(method, scheme), monkeypatch)
    target = logits(memory.model(source))
    # In evaluation bitsandbytes multiplies in bfloat16 on some CPUs; in training mode it is exact on all.
    model = loaded(tmp_path / "out")
    got = logits(model.train() if scheme.rules.format == "bitsandbytes" else model)
    assert apart([got], [target]) < (1e-4 if scheme.activations is None else 5e-3)


SMALL = [Scheme(4, 16, grid="nvfp4"), *(Scheme(bits, 32, grid=f"mxfp{bits}") for bits in (4, 6, 8))]
SMALL_CASES = [(m, SMALL[0]) for m in ("hqq", "gptq+signround", "gptq+distill")]
SMALL_CASES += [(m, SMALL[1]) for m in ("awq", "signround", "gptq+distill")]
SMALL_CASES += [("gptq", s) for s in SMALL[2:]]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("models") / "half", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), SMALL_CASES, ids=str)
def test_stock_transformers_reads_microscaling_floats(method: str, scheme: Scheme, half: Path, tmp_path: Path) -> None:
    """In bfloat16, the only dtype in which it does; parts of one matrix have one scale of scales."""
    job.quantize(str(half), tmp_path / "out", recipe(method, scheme), ids=ids(40, 64))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert stock.dtype == torch.bfloat16
    assert torch.equal(logits(stock), logits(llmq.load(tmp_path / "out", device_map="cpu").eval()))
    assert 1e-3 < apart([logits(stock).float()], [logits(loaded(half))]) < 0.6
    stored = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    divisors = {name: float(value) for name, value in stored.items() if name.endswith("weight_global_scale")}
    assert bool(divisors) == (scheme == SMALL[0])
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        first = [name for name in divisors if fused[0] in name]
        for name in first:
            assert len({divisors[name.replace(fused[0], part)] for part in fused}) == 1


def on(windows: Tensor, model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(windows).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [NF4, DOUBLE, FP8], ids=str)
def test_calibration_pays_on_every_grid(
    scheme: Scheme, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits on the calibration windows err less than rounding to nearest; signround lowers its blocks' error."""
    windows, error = ids(8, 64), {}
    target = on(windows, loaded(source))
    for method in ("rtn", "gptq", "signround"):
        report, memory = quantized(source, tmp_path / method, recipe(method, scheme), monkeypatch, windows)
        error[method] = apart([on(windows, memory.model(source))], [target])
    assert error["gptq"] < 0.9 * error["rtn"]
    tried = [attempt for block in report.blocks for attempt in block.log]
    assert any(attempt.outcome is Outcome.KEPT and attempt.after < attempt.before for attempt in tried)


APOT, LOG = Scheme(4, 32, grid="apot"), Scheme(3, 32, grid="log")
OWN = [("gptq+signround", APOT), ("gptq", LOG), ("hqq", Scheme(2, 32, grid="ternary", packing="llmq"))]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), OWN, ids=str)
def test_llmq_reads_what_every_quantizer_writes_for_it_alone(
    method: str, scheme: Scheme, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, memory = quantized(source, tmp_path / "out", recipe(method, scheme), monkeypatch)
    got = logits(llmq.load(tmp_path / "out", device_map="cpu").eval())
    assert apart([got], [logits(memory.model(source))]) < 1e-4


POWERS = [
    ("gptq+signround", Scheme(4, 32, scales="pow2")),
    ("hqq", Scheme(3, 32, False, scales="pow2")),
    ("rtn+block_qat", Scheme(8, None, activations=Activations(dynamic=False), scales="pow2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), POWERS, ids=str)
def test_stored_scales_are_powers_of_two(
    method: str, scheme: Scheme, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of weights and of static inputs, after all methods; stock transformers reads what llmq had in memory."""
    _, memory = quantized(source, tmp_path / "out", recipe(method, scheme), monkeypatch)
    stored = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    kinds = {name.rpartition(".")[2] for name in stored if name.endswith("_scale")}
    assert kinds == {"weight_scale"} | ({"input_scale"} if scheme.activations else set())
    for name, scale in stored.items():
        assert not name.endswith("_scale") or bool((torch.frexp(scale)[0] == 0.5).all())
    got, target = logits(loaded(tmp_path / "out")), logits(memory.model(source))
    assert apart([got], [target]) < (1e-4 if scheme.activations is None else 5e-3)


def test_every_weight_is_on_its_grid(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by its block's magnitude, each value that stock transformers reads is one of bitsandbytes' 16."""
    functional = pytest.importorskip("bitsandbytes.functional")
    quantized(source, tmp_path / "out", recipe("gptq", NF4), monkeypatch)
    model, levels = loaded(tmp_path / "out"), functional.get_4bit_type("nf4", device="cpu")
    weights = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert weights
    for weight in weights:
        value = functional.dequantize_4bit(weight.data, weight.quant_state).float().flatten().view(-1, 64)
        scale = weight.quant_state.absmax.view(-1, 1)
        assert (
            float((value / scale - levels[(value / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)]).abs().max())
            < 1e-5
        )
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
