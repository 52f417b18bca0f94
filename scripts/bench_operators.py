"""The operators that bench_kernels.py measures: one weight in the form of each operator, of llmq and of other packages.

Each function converts a weight to an operator's own form on its device, or returns a string that says why it cannot.
The expected result is computed here, in float32, without any of the measured code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Operator = Callable[[Tensor], Tensor]


@dataclass
class Weight:
    """A random integer weight [out, in]: (code − zero) · scale, group by group along the inputs.

    codes: int8 [out, in]; scale: `dtype` [out, groups]; zero: int8 like scale, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.codes.device

    @cached_property
    def dense(self) -> Tensor:
        """The dequantized weight, float32 [out, in]."""
        width = self.shape[1]
        dense = self.codes.float()
        if self.zero is not None:
            dense -= self.zero.float().repeat_interleave(self.group_size, 1)[:, :width]
        return dense.mul_(self.scale.float().repeat_interleave(self.group_size, 1)[:, :width])


@dataclass
class Prepared:
    """An operator on a weight. tensors: everything that it reads; bind: a copy of these → the operator on x [M, in];
    expected: x → the correct result, float32; note: the weight's layout, if there are several.
    """

    tensors: tuple[Tensor | None, ...]
    bind: Callable[..., Operator]
    expected: Operator
    note: str = ""

    @property
    def bytes(self) -> int:
        """The bytes of the weight in the operator's form."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor is not None)


def random_weight(
    shape: tuple[int, int], bits: int, group_size: int, asymmetric: bool, dtype: torch.dtype, device: torch.device
) -> Weight:
    """A random weight with codes of every value; a group_size of 0 is one group per row."""
    rows, width = shape
    group_size = group_size or width
    half, groups = 1 << (bits - 1), -(-width // group_size)
    generator = torch.Generator(device).manual_seed(rows * 31 + width)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, device=device, generator=generator)
    scale = torch.rand(rows, groups, device=device, generator=generator).mul_(0.02).add_(0.005).to(dtype)
    zero = torch.randint(-half, half, (rows, groups), dtype=torch.int8, device=device, generator=generator)
    return Weight(codes, scale, zero if asymmetric else None, bits, group_size)


def product(dense: Tensor) -> Operator:
    """x → x · Wᵀ in float32."""
    return lambda x: linear(x.float(), dense.float())


def module(name: str) -> ModuleType | str:
    """A package, or why it cannot be imported; some packages fail on import without a GPU."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return "not installed"
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """An exception's message, shortened for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def torch_dense(weight: Weight) -> Prepared | str:
    """torch's own linear on the weight rounded to the inputs' dtype: the baseline of all ratios."""
    return Prepared((weight.dense.to(weight.dtype),), lambda w: lambda x: linear(x, w), product(weight.dense))


def llmq_int(weight: Weight) -> Prepared | str:
    """torch.ops.llmq.int_linear, in the layout that llmq chooses."""
    import llmq_kernels.ops  # noqa: F401
    from llmq.formats.packing import pack_codes
    from llmq_kernels.int_linear import layouts

    (rows, width), bits, group = weight.shape, weight.bits, weight.group_size
    name, _ = layouts.choose(weight.device, weight.dtype, bits, rows, width, group)
    words = pack_codes(weight.codes, bits)
    packed = layouts.pack(name, words, weight.scale, weight.zero, bits, width, group, weight.dtype)

    def bind(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Operator:
        return lambda x: torch.ops.llmq.int_linear(x, codes, scale, zero, None, bits, rows, width, group, name)

    return Prepared(packed, bind, product(weight.dense), name)


def llmq_nf4(weight: Weight) -> Prepared | str:
    """NF4, magnitudes in 8 bits: torch.ops.llmq.nf4_linear, or on a GPU, where they are unpacked, codebook_linear."""
    import llmq_kernels.ops  # noqa: F401
    from llmq.grids.nf4 import quantize_nf4
    from llmq.grids.scheme import Scheme
    from llmq_kernels.codebook_linear import codebooks
    from llmq_kernels.weights import PackedCodebook

    made = quantize_nf4(weight.dense.to(weight.dtype), Scheme(4, 64, grid="nf4", double_quant=True))
    assert made.nested is not None
    rows, width = weight.shape
    offset, nested = made.nested.offset, made.nested
    if weight.device.type == "cuda":
        inner = nested.absmax, nested.codebook, offset
        stored = PackedCodebook(made.packed.view(-1), made.absmax, made.codebook, *inner, rows, width, 64)
        form = codebooks.of_blocks(stored)

        def look_up(packed: Tensor, scale: Tensor, codebook: Tensor, tables: Tensor) -> Operator:
            given = packed, scale, codebook, tables, None, rows, width, 64
            return lambda x: torch.ops.llmq.codebook_linear(x, *given)

        tensors = (form.packed, form.scale, form.codebook, form.tables)
        return Prepared(tensors, look_up, product(made.dequantize(weight.dtype)), "planes")

    def bind(packed: Tensor, absmax: Tensor, codebook: Tensor, nested: Tensor, levels: Tensor) -> Operator:
        arguments = (packed, absmax, codebook, nested, levels, offset, None, rows, width, 64)
        return lambda x: torch.ops.llmq.nf4_linear(x, *arguments)

    tensors = (made.packed.view(-1), made.absmax, made.codebook, made.nested.absmax, made.nested.codebook)
    return Prepared(tensors, bind, product(made.dequantize(weight.dtype)))


def llmq_nf4_int8(weight: Weight) -> Prepared | str:
    """NF4 rounded to 8-bit integers, which `llmq.load(…, codebooks="int8")` makes of it on a CPU."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return "on a CPU in bfloat16 only"
    import llmq_kernels.ops  # noqa: F401
    from llmq.grids.nf4 import quantize_nf4
    from llmq.grids.scheme import Scheme
    from llmq_kernels import rounded
    from llmq_kernels.int_linear import layouts
    from llmq_kernels.weights import PackedCodebook

    made = quantize_nf4(weight.dense.to(weight.dtype), Scheme(4, 64, grid="nf4"))
    rows, width = weight.shape
    stored = PackedCodebook(made.packed.view(-1), made.absmax, made.codebook, None, None, 0.0, rows, width, 64)
    plain = rounded.of_blocks(stored)
    name, _ = layouts.choose(weight.device, weight.dtype, 8, rows, width, 64)
    packed = layouts.pack(name, plain.packed, plain.scale, None, 8, width, 64, weight.dtype)

    def bind(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Operator:
        return lambda x: torch.ops.llmq.int_linear(x, codes, scale, zero, None, 8, rows, width, 64, name)

    return Prepared(packed, bind, product(made.dequantize(weight.dtype)), name)


def llmq_int8(weight: Weight) -> Prepared | str:
    """torch.ops.llmq.int8_linear: inputs rounded to 8 bits per token, one scale per output."""
    import llmq_kernels.ops  # noqa: F401
    from llmq.grids.activations import round_per_token

    scale = weight.dense.abs().amax(1, keepdim=True) / 127
    codes = (weight.dense / scale).round_().to(torch.int8)
    dense = codes.float() * scale
    return Prepared(
        (codes, scale),
        lambda w, s: lambda x: torch.ops.llmq.int8_linear(x, w, s, None, None),
        lambda x: linear(round_per_token(x, "int").float(), dense),
    )


def llmq_float8(weight: Weight) -> Prepared | str:
    """torch.ops.llmq.float8_linear: weights and inputs in float8_e4m3fn, inputs per token, one scale per output."""
    import llmq_kernels.ops  # noqa: F401
    from llmq.grids.activations import round_per_token

    scale = (weight.dense.abs().amax(1, keepdim=True) / 448).to(weight.dtype)
    codes = (weight.dense / scale).clamp_(-448, 448).to(torch.float8_e4m3fn)
    dense = codes.float() * scale.float()
    # What a layer holds on a GPU.
    held = scale if weight.device.type == "cpu" else scale.float()
    return Prepared(
        (codes, held),
        lambda w, s: lambda x: torch.ops.llmq.float8_linear(x, w, s, None, None),
        lambda x: linear(round_per_token(x, "fp8").float(), dense),
    )


def torch_int4(weight: Weight) -> Prepared | str:
    """torch's own int4 operator (tinygemm), on a GPU or a CPU: (stored − 8) · scale + shift, in bfloat16."""
    if weight.bits != 4 or weight.dtype != torch.bfloat16 or weight.group_size not in (32, 64, 128, 256):
        return "4 bits, bfloat16, groups of 32 to 256 only"
    if weight.shape[1] % weight.group_size:
        return "whole groups only"
    stored = weight.codes.to(torch.int32) + 8
    shift = torch.zeros_like(weight.scale) if weight.zero is None else -weight.zero.to(weight.dtype) * weight.scale
    scales = torch.stack((weight.scale, shift), 2).transpose(0, 1).contiguous()
    if weight.device.type == "cuda":
        pairs = (stored[:, ::2] << 4 | stored[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        run = torch.ops.aten._weight_int4pack_mm
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored, 1)
        run = torch.ops.aten._weight_int4pack_mm_for_cpu
    group = weight.group_size
    return Prepared((packed, scales), lambda w, s: lambda x: run(x, w, group, s), product(weight.dense))


def bitsandbytes_nf4(weight: Weight) -> Prepared | str:
    """bitsandbytes' NF4, magnitudes in 8 bits: matmul_4bit, which uses its GEMV for one row."""
    found = module("bitsandbytes")
    if isinstance(found, str):
        return found
    peer: Any = found
    functional: Any = importlib.import_module("bitsandbytes.functional")
    dense = weight.dense.to(weight.dtype)
    packed, made = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    inner = made.state2

    def bind(codes: Tensor, absmax: Tensor, nested: Tensor) -> Operator:
        again = functional.QuantState
        state2 = again(absmax=nested, blocksize=inner.blocksize, code=inner.code, dtype=inner.dtype)
        state = again(absmax, made.shape, made.code, made.blocksize, made.quant_type, made.dtype, made.offset, state2)
        return lambda x: peer.matmul_4bit(x, codes.t(), quant_state=state)

    return Prepared((packed, made.absmax, inner.absmax), bind, product(functional.dequantize_4bit(packed, made)))


def gemlite_int(weight: Weight) -> Prepared | str:
    """GemLite's weight-only product, with its own choice of kernel; its autotuning counts as the first call."""
    if weight.device.type != "cuda":
        return "needs a GPU"
    if weight.bits not in (2, 4, 8) or weight.shape[1] % weight.group_size:
        return "2, 4 or 8 bits, whole groups only"
    found = module("gemlite")
    if isinstance(found, str):
        return found
    peer: Any = found
    kind = {torch.float16: peer.DType.FP16, torch.bfloat16: peer.DType.BF16}.get(weight.dtype)
    if kind is None:
        return "float16 and bfloat16 only"
    rows, width = weight.shape
    made = peer.GemLiteLinear(weight.bits, weight.group_size, width, rows, input_dtype=kind, output_dtype=kind)
    half = 1 << (weight.bits - 1)
    stored = (weight.codes.to(torch.int16) + half).to(torch.uint8)
    zero = half if weight.zero is None else (weight.zero.to(weight.dtype) + half)
    made.pack(stored, weight.scale, zero, None)
    arguments = made.get_meta_args()

    def bind(*tensors: Tensor) -> Operator:
        return lambda x: peer.forward_functional(x, None, [*tensors], arguments)

    return Prepared(tuple(part.data for part in made.get_tensor_args()), bind, product(weight.dense))


BASE = "torch"
"""The baseline of ratios."""

OPERATORS: dict[str, Callable[[Weight], Prepared | str]] = {
    BASE: torch_dense,
    "llmq int": llmq_int,
    "llmq nf4": llmq_nf4,
    "llmq nf4 int8": llmq_nf4_int8,
    "llmq int8": llmq_int8,
    "llmq float8": llmq_float8,
    "torch int4": torch_int4,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "gemlite": gemlite_int,
}


def rotated(prepared: Prepared, copies: int) -> list[Operator]:
    """The operator on this many copies of its weight, so that the next copy is never in cache."""
    sets = [prepared.tensors]
    sets += [tuple(None if t is None else t.clone() for t in prepared.tensors) for _ in range(copies - 1)]
    return [prepared.bind(*one) for one in sets]


def mistake(got: Tensor, want: Tensor) -> tuple[float, bool]:
    """(relative error, whether it is more than rounding) of a result, both [M, out].

    A result is wrong if ‖got − want‖ > 2 % of ‖want‖, or if one value is off by a tenth of the typical size. Rounding
    of bfloat16 sums and atomics is a fifth of either limit; the second one reveals a lost tile or a wrong last column.
    """
    if got.shape != want.shape:
        return float("inf"), True
    gap, size = got.float() - want, want.square().mean().sqrt()
    error = float(gap.square().mean().sqrt() / size)
    wrong = not error <= 0.02 or not float(gap.abs().max()) <= 0.1 * float(size)
    return error, wrong
