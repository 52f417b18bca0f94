"""Codes with scales of every published form: their values against other readers or the formats' own formulas, bit for
bit; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.formats import dequantized
from llmq.formats.dequantized import Dequantized, open_source
from llmq.formats.scaled import VALUES
from tests.llmq.formats import published
from tests.llmq.formats.published import E4M3
from tests.llmq.refusal import refused

W = "a.b.weight"


@dataclass(frozen=True)
class Form:
    """A weight as a tool stores it, and its values. codes, scale, second: names of tensors."""

    section: dict[str, Any]
    tensors: dict[str, Tensor]
    values: Tensor
    scale: str
    codes: str = W
    second: str | None = None
    others: dict[str, Tensor] = field(default_factory=dict)


def made(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def compressed(layout: str) -> Form:
    stored, values = published.compressed(made(40, 96), layout)
    tensors = {f"a.b.{suffix}": tensor for suffix, tensor in stored.items()}
    codes = W if layout == "mxfp8-quantized" else f"{W}_packed"
    second = f"{W}_global_scale" if layout.startswith("nv") else None
    others = {"a.b.input_global_scale": torch.ones(1)}
    return Form(published.group_of(layout)[1], tensors, values, f"{W}_scale", codes, second, others)


def number(code: int) -> float:
    """E2M1: a sign, two bits of exponent with bias 1, one of mantissa (OCP, Microscaling Formats 1.0, 5.3.3)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -size if sign else size


def by_formula(codes: Tensor, factor: Callable[[int, int], float], pairs: bool) -> Tensor:
    """Each weight alone: its code's number times its factor, in float32, rounded to bfloat16."""
    rows, width = codes.shape[0], codes.shape[1] * (2 if pairs else 1)
    plain = codes if pairs else codes.float()
    value = torch.empty(rows, width)
    for row in range(rows):
        for column in range(width):
            if pairs:
                byte = int(plain[row, column // 2])
                one = number(byte >> 4 if column % 2 else byte & 15)
            else:
                one = float(plain[row, column])
            value[row, column] = torch.tensor(one) * torch.tensor(factor(row, column))
    return value.bfloat16()


def modelopt_nvfp4(algorithm: str) -> Form:
    codes, scale, second = published.nvfp4(made(10, 64))
    expected = by_formula(codes, lambda row, column: float(scale[row, column // 16].float() * second), True)
    names = {W: codes, f"{W}_scale": scale, f"{W}_scale_2": second}
    section = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16}
    return Form(
        section, names, expected, f"{W}_scale", second=f"{W}_scale_2", others={"a.b.input_scale": torch.ones(())}
    )


def modelopt_mx(algorithm: str, bits: int) -> Form:
    codes, exponents = published.mx(made(10, 64), bits)
    expected = by_formula(codes, lambda row, column: 2.0 ** (int(exponents[row, column // 32]) - 127), bits == 4)
    section = {"quant_method": "modelopt", "quant_algo": algorithm}
    return Form(section, {W: codes, f"{W}_scale": exponents}, expected, f"{W}_scale")


def modelopt_tiles(algorithm: str, size: int | None) -> Form:
    """The scales have ones between their axes: [rows of tiles, 1, columns of tiles, 1]."""
    weight = made(40, 48) if size else made(130, 200)
    codes, scales = published.tiled(weight, (size or 128, size or 128))
    tile = size or 128
    expected = by_formula(codes, lambda row, column: float(scales[row // tile, column // tile]), False)
    section = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": size}
    return Form(section, {W: codes, f"{W}_scale": scales[:, None, :, None].contiguous()}, expected, f"{W}_scale")


def modelopt_rows() -> Form:
    codes, scale = published.by_row(made(10, 64), torch.float32)
    expected = by_formula(codes, lambda row, column: float(scale[row, 0]), False)
    section = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    return Form(section, {W: codes, f"{W}_scale": scale[:, 0].contiguous()}, expected, f"{W}_scale")


def deepseek(*shape: int, dtype: torch.dtype = torch.float8_e8m0fnu) -> Form:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, exponents = published.mx(made(*shape), 4)
    stored, scale = codes.view(torch.int8), exponents.view(dtype)
    expected = Fp8Dequantize(None)._dequantize_one(stored, scale, torch.bfloat16)
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    codes_name, scale_name = (W, "a.b.scale") if len(shape) == 2 else ("a.up", "a.up_scale_inv")
    return Form(section, {codes_name: stored, scale_name: scale}, expected, scale_name, codes_name)


def fbgemm() -> Form:
    codes, scale = published.by_row(made(10, 64), torch.float32)
    expected = by_formula(codes, lambda row, column: float(scale[row, 0]), False)
    section = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    tensors = {W: codes, f"{W}_scale": scale}
    return Form(section, tensors, expected, f"{W}_scale", others={"a.b.input_scale_ub": torch.tensor([1200.0])})


FORMS: dict[str, Callable[[], Form]] = {
    **{layout: lambda layout=layout: compressed(layout) for layout in published.LAYOUTS},  # type: ignore[misc]
    "modelopt NVFP4": lambda: modelopt_nvfp4("NVFP4"),
    "modelopt W4A16_NVFP4": lambda: modelopt_nvfp4("W4A16_NVFP4"),
    "modelopt MXFP4": lambda: modelopt_mx("MXFP4", 4),
    "modelopt MXFP8": lambda: modelopt_mx("MXFP8", 8),
    "modelopt FP8_PB_WO": lambda: modelopt_tiles("FP8_PB_WO", None),
    "modelopt fp8_pb_wo": lambda: modelopt_tiles("fp8_pb_wo", 16),
    "modelopt FP8_PER_CHANNEL_PER_TOKEN": modelopt_rows,
    "deepseek FP4": lambda: deepseek(24, 96),
    "deepseek FP4, exponents in uint8": lambda: deepseek(24, 96, dtype=torch.uint8),
    "a stack in FP4": lambda: deepseek(3, 24, 64),
    "fbgemm": fbgemm,
}  # fmt: skip
NVFP4 = [name for name in FORMS if "nvfp4" in name.lower()]
ROWS = ("modelopt FP8_PER_CHANNEL_PER_TOKEN", "fbgemm")


@cache
def made_in(name: str) -> Form:
    """Nobody changes it."""
    return FORMS[name]()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return made_in(request.param)


def write(path: Path, section: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    save_file(
        {n: t.contiguous() for n, t in tensors.items()} | {"norm.weight": torch.ones(4)}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"quantization_config": section}))
    return path


def test_values(tmp_path: Path, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, form.section, form.tensors | form.others))
    assert isinstance(source, Dequantized)
    name = form.codes.removesuffix("_packed")
    assert sorted(source.names()) == [name, "norm.weight"]
    assert all(other in source.warnings[-1] for other in form.others)
    value = source.read(name)
    assert source.info(name).shape == value.shape and source.info(name).dtype == value.dtype == torch.bfloat16
    assert torch.equal(value, form.values.bfloat16())
    weight = made(*value.shape)
    assert 0.005 < float((value - weight).float().norm() / weight.float().norm()) < 0.2
    count = value.shape[0]
    for chunk in (dequantized.CHUNK, 1, 5 * value[0].numel()):
        monkeypatch.setattr(dequantized, "CHUNK", chunk)
        for start, stop in ((0, 1), (count - 1, count), (0, count), (1, count // 2), (2, 2)):
            assert torch.equal(source.read_rows(name, start, stop), value[start:stop])


def test_numbers_of_the_codes_are_those_of_the_document() -> None:
    assert list(VALUES) == [number(code) for code in range(16)]


def test_experts_of_fbgemm_are_those_that_transformers_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In [experts, in, out], with a scale for each output; in [experts, out, 1] for the second stack."""
    from transformers.integrations import fbgemm_fp8

    def per_row(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = published.by_row(weight, torch.float32)
        return codes, scale[:, 0]

    monkeypatch.setattr(fbgemm_fp8, "quantize_fp8_per_row", per_row, raising=False)
    monkeypatch.setattr(fbgemm_fp8, "on_device", lambda _: torch.inference_mode(False))
    experts = fbgemm_fp8.FbgemmFp8Llama4TextExperts.__new__(fbgemm_fp8.FbgemmFp8Llama4TextExperts)
    nn.Module.__init__(experts)
    stacks = {"gate_up_proj": made(3, 16, 24), "down_proj": made(3, 12, 12)}
    for name in stacks:
        setattr(experts, name, nn.Parameter(torch.empty(0)))
    model, tensors = nn.Module(), {}
    model.add_module("experts", experts)
    for name, weight in stacks.items():
        made_by = fbgemm_fp8.FbgemmFp8Quantize(None).convert({f"experts.{name}": [weight]}, model=model)
        tensors |= {key: tensor.data for key, tensor in made_by.items()}
    assert tensors["experts.down_proj_scale"].shape == (3, 12, 1)
    source = open_source(write(tmp_path, fbgemm().section, tensors))
    for name, weight in stacks.items():
        scale = tensors[f"experts.{name}_scale"].reshape(3, 1, -1)
        value = source.read(f"experts.{name}")
        assert torch.equal(value, (tensors[f"experts.{name}"].float() * scale).bfloat16())
        assert float((value - weight).float().norm() / weight.float().norm()) < 0.04
        assert torch.equal(source.read_rows(f"experts.{name}", 1, 3), value[1:])


@pytest.mark.parametrize("second", [(3,), (3, 1, 1), ()])
def test_a_stack_with_a_second_scale_for_each_expert(tmp_path: Path, second: tuple[int, ...]) -> None:
    weight = made(3, 8, 32)
    parts = [published.nvfp4(one) for one in (weight if second else weight[:1])]
    codes, scale = (torch.stack([part[at] for part in parts] * (1 if second else 3)) for at in (0, 1))
    factor = torch.stack([part[2] for part in parts])
    tensors = {"a.up": codes, "a.up_weight_scale": scale, "a.up_weight_scale_2": factor.reshape(second)}
    source = open_source(write(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors))
    for expert in range(3):
        one = factor[expert if second else 0]
        expected = by_formula(
            codes[expert], lambda r, c, e=expert, o=one: float(scale[e, r, c // 16].float() * o), True
        )
        assert torch.equal(source.read_rows("a.up", expert, expert + 1)[0], expected)
        assert torch.equal(source.read("a.up")[expert], expected)


def test_layers_of_several_algorithms(tmp_path: Path) -> None:
    forms = {"p": made_in("modelopt NVFP4"), "q": made_in("modelopt MXFP8"), "r": made_in("modelopt FP8_PB_WO")}
    layers = {f"{key}.b": {"quant_algo": form.section["quant_algo"]} for key, form in forms.items()}
    section: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    tensors = {f"{key}{name[1:]}": t for key, form in forms.items() for name, t in form.tensors.items()}
    source = open_source(write(tmp_path, section, tensors))
    for key, form in forms.items():
        assert torch.equal(source.read(f"{key}.b.weight"), form.values)
    layers["s"] = {"quant_algo": "W4A8_AWQ"}
    path = write(tmp_path, section, tensors)
    refused(lambda: open_source(path), str(path), "start from the unquantized model")


@pytest.mark.parametrize("factor", [-1.0, 0.0])
@pytest.mark.parametrize("name", ["nvfp4-pack-quantized", "modelopt NVFP4", *ROWS])
def test_negative_and_zero_scales_are_numbers(tmp_path: Path, name: str, factor: float) -> None:
    """As every other reader takes them."""
    form = made_in(name)
    tensors = {key: t.clone() for key, t in form.tensors.items()}
    tensors[form.scale].copy_((tensors[form.scale].float() * factor).to(tensors[form.scale].dtype))
    value = open_source(write(tmp_path, form.section, tensors)).read(W)
    assert torch.equal(value, form.values * factor)


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a row less": lambda t: t[:-1],
    "a column less": lambda t: t[..., :-1],
    "flat": lambda t: torch.cat([t.flatten().float(), torch.ones(1)]).to(t.dtype),
    "int32": lambda t: t.float().int(),
    "float64": lambda t: t.float().double(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_scales_of_another_shape_or_dtype(tmp_path: Path, form: Form, damage: str) -> None:
    scale = form.tensors[form.scale]
    path = write(tmp_path, form.section, form.tensors | {form.scale: DAMAGE[damage](scale)})
    refused(lambda: open_source(path), str(path), form.scale, "download", "start from the unquantized model")


def test_scales_that_are_missing(tmp_path: Path, form: Form) -> None:
    path = write(tmp_path, form.section, {n: t for n, t in form.tensors.items() if n == form.codes})
    if form.codes == "a.up":
        # Nothing says that bytes of this name are codes: the plan refuses them as a weight's numbers.
        assert open_source(path).info("a.up").dtype == torch.int8
    else:
        refused(lambda: open_source(path), str(path), form.codes, "are missing", "start from the unquantized model")


def test_scales_that_are_no_numbers(tmp_path: Path, form: Form) -> None:
    scale = form.tensors[form.scale].clone()
    if scale.dtype.itemsize == 1:
        scale.view(torch.uint8).flatten()[-1] = 0x7F if scale.dtype == E4M3 else 0xFF
        values = [scale]
    else:
        values = [scale.clone(), scale.clone()]
        values[0].flatten()[-1], values[1].flatten()[-1] = torch.nan, torch.inf
    for value in values:
        path = write(tmp_path, form.section, form.tensors | {form.scale: value})
        read = partial(open_source(path).read, form.codes.removesuffix("_packed"))
        refused(read, str(path), form.scale, "download")


@pytest.mark.parametrize("name", NVFP4)
@pytest.mark.parametrize(
    ("second", "words"),
    [
        (None, ("is missing",)),
        (torch.ones(2), ("[2]", "one number")),
        (torch.ones(1, dtype=torch.int32), ("int32", "float32")),
    ],
)
def test_second_scales_that_do_not_fit(
    tmp_path: Path, name: str, second: Tensor | None, words: tuple[str, ...]
) -> None:
    form = made_in(name)
    assert form.second is not None
    tensors = {n: t for n, t in form.tensors.items() if n != form.second}
    path = write(tmp_path, form.section, tensors | ({} if second is None else {form.second: second}))
    refused(lambda: open_source(path), str(path), form.second, "start from the unquantized model", *words)


@pytest.mark.parametrize("name", NVFP4)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_second_scales_that_are_no_numbers(tmp_path: Path, name: str, value: float) -> None:
    form = made_in(name)
    path = write(tmp_path, form.section, form.tensors | {str(form.second): torch.tensor([value])})
    refused(lambda: open_source(path).read(W), str(path), str(form.second), "download")


def test_scales_are_not_divided_by_zero(tmp_path: Path) -> None:
    form = made_in("nvfp4-pack-quantized")
    path = write(tmp_path, form.section, form.tensors | {str(form.second): torch.zeros(1)})
    refused(lambda: open_source(path).read(W), str(path), f"{W}_global_scale is 0", "start from the unquantized model")


@pytest.mark.parametrize("name", [name for name in FORMS if "quantized" in name])
def test_a_section_that_says_other_bits(tmp_path: Path, name: str) -> None:
    form = made_in(name)
    four = form.codes != W
    other = "mxfp8-quantized" if four else "nvfp4-pack-quantized"
    path = write(tmp_path, published.group_of(other)[1], form.tensors)
    says = f"has codes of {4 if four else 8} bits, and config.json says {8 if four else 4}"
    refused(lambda: open_source(path), str(path), form.codes, says, "start from the unquantized model")


def test_a_group_size_that_does_not_fit(tmp_path: Path) -> None:
    form = made_in("nvfp4-pack-quantized")
    section = published.group_of("nvfp4-pack-quantized")[1]
    section["config_groups"]["group_0"]["weights"]["group_size"] = 32
    path = write(tmp_path, section, form.tensors)
    refused(lambda: open_source(path), str(path), f"{W}_scale is [40, 6] for a weight [40, 96]", "tiles of 1x32")
    section["config_groups"]["group_0"]["weights"]["group_size"] = "x"
    assert open_source(write(tmp_path, section, form.tensors)).read(W).shape == (40, 96)


BROKEN: list[Any] = ["x", 5, -1, True, None, [], [1, "a"], ["re:(("], {}, {"a": 5}, {"a": None}]


def test_a_section_with_broken_values_is_read_or_refused_in_one_line(tmp_path: Path, form: Form) -> None:
    """Never a traceback; and what is read has the values that it has."""
    path = write(tmp_path, form.section, form.tensors)
    more = ("weight_block_size", "scale_fmt", "quant_algo", "quantized_layers", "config_groups", "sparsity_config")
    refusals = 0
    for key in dict.fromkeys([*form.section, *more, "group_size"]):
        for value in BROKEN:
            (path / "config.json").write_text(json.dumps({"quantization_config": form.section | {key: value}}))
            try:
                source = open_source(path)
            except LlmqError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refusals += 1
                continue
            if isinstance(source, Dequantized) and source.coded:
                assert torch.equal(source.read(form.codes.removesuffix("_packed")), form.values.bfloat16())
    assert refusals >= len(BROKEN)


def test_codes_beside_the_weight_itself(tmp_path: Path) -> None:
    form = made_in("nvfp4-pack-quantized")
    path = write(tmp_path, form.section, form.tensors | {W: made(40, 96)})
    refused(lambda: open_source(path), str(path), f"{W}_packed is stored beside {W}")
