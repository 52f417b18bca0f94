"""All launches of all kernels, in every configuration that the rules can select, for scripts/compile_kernels.py.

Tensors are on the meta device; the same functions build these launches and the real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int8_linear import triton as int8
from llmq_kernels.int_linear import triton as integers
from llmq_kernels.int_linear.planes import TILE, WORDS
from llmq_kernels.triton import columns, dequantize, inputs, routes, sums
from llmq_kernels.triton.config import Config, Kind
from llmq_kernels.triton.gpu import KNOWN, Gpu
from llmq_kernels.triton.launch import Launch
from llmq_kernels.triton.rule import routed_rule, rule
from llmq_kernels.triton.tables import BUCKETS
from llmq_kernels.weights import PackedInt, PackedInt8

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Rows and columns of typical weights: narrow and wide; K fills all tiles, those of some bit widths, or of none.
SHAPES = tuple(itertools.product((96, 1024, 4096, 8192, 28672), (160, 2048, 4096, 11008, 14336)))


# Of experts: rows that are routed to them; how many there are, and the shapes of their matrices.
ROUTED = tuple(1 << i for i in range(4, 16))
EXPERTS = tuple(itertools.product((8, 128), ((96, 160), (768, 2048), (2048, 768), (28672, 4096), (4096, 14336))))


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that its machine code depends on. target: as `Gpu.target`."""

    name: str
    target: str
    launch: Launch


def variants() -> Iterator[Variant]:
    """All variants; names are unique per target."""
    for gpu in KNOWN:
        yield from _integers(gpu)
        yield from _dequantize(gpu)
        yield from _codebooks(gpu)
        yield from _routed(gpu)
        yield from _sums(gpu)
        yield from _inputs(gpu)
        yield from _int8(gpu)
        yield from _columns(gpu)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _planes(bits: int, n: int, k: int, group_size: int, zero: bool, dtype: torch.dtype) -> PackedInt:
    groups = -(-k // group_size)
    packed = _meta(torch.int16, n, -(-k // TILE[bits]) * WORDS[bits])
    zeros = _meta(torch.int8, groups, n) if zero else None
    return PackedInt(packed, _meta(dtype, groups, n), zeros, bits, n, k, group_size)


def _looked_up(weight: PackedInt, codebooks: int) -> PackedInt:
    scale = _meta(torch.float32, *weight.scale.shape)
    entries, tables = _meta(torch.float32, codebooks, 16), _meta(torch.int32, 2, 8, codebooks)
    return replace(weight, scale=scale, codebook=entries, tables=tables)


def _stacked(weight: PackedInt, experts: int) -> PackedInt:
    made: dict[str, Any] = {}
    for name in ("packed", "scale", "zero", "codebook", "tables"):
        one = getattr(weight, name)
        made[name] = None if one is None else _meta(one.dtype, experts, *one.shape)
    return replace(weight, **made)


def choices(gpu: Gpu) -> Iterator[tuple[Config, int, int, int, int, int]]:
    """The configurations that the rule can select: configuration, bits, rows of x, weight shape [n, k], group size;
    each once.

    Every number of programs that share K is represented by two: the code differs only in a constant of an address.
    """
    seen = set()
    for bits, group_size, (n, k), m in itertools.product(TILE, (128, 32), SHAPES, BUCKETS):
        config = rule(gpu, bits, m, n, k, group_size)
        config = replace(config, programs_k=min(config.programs_k, 2))
        # EVEN_K of the kernels depends on this; one_row has none.
        side_by_side = config.warps if config.family == "few_rows" else 1
        even = config.family != "one_row" and k % (TILE[bits] * side_by_side) == 0
        if config.family == "dense" or (bits, group_size, even, config) in seen:
            continue
        seen.add((bits, group_size, even, config))
        yield config, bits, m, n, k, group_size


def product(
    config: Config,
    bits: int,
    m: int,
    n: int,
    k: int,
    group_size: int,
    zeros: bool,
    dtype: torch.dtype,
    backend: str,
    biased: bool = False,
    codebooks: int = 0,
) -> Launch:
    """The launch of a product of m rows by a weight [n, k] with a configuration, on the meta device.

    codebooks: of a weight of codebook entries, 1 or n.
    """
    y = _meta(dtype, m, n) if config.programs_k == 1 else _meta(torch.float32, config.programs_k, m, n)
    weight = _planes(bits, n, k, group_size, zeros, dtype)
    if codebooks:
        weight = _looked_up(weight, codebooks)
    bias = _meta(dtype, n) if biased else None
    return integers.build(config, m, _meta(dtype, m, k), weight, bias, y, backend)


def _integers(gpu: Gpu) -> Iterator[Variant]:
    common = {"BITS", "GROUP", "RUN", "BLOCK_M", "BLOCK_N", "BACKEND"}
    for config, bits, m, n, k, group_size in choices(gpu):
        for (label, dtype), zero in itertools.product(HALF.items(), (False, True)):
            made = product(config, bits, m, n, k, group_size, zero, dtype, gpu.backend, biased=True)
            flags = "".join(f" {name.lower()} {value}" for name, value in made.constexprs.items() if name not in common)
            name = (
                f"{config.family} {bits} bits group {made.constexprs['GROUP']} {label}{' zero' if zero else ''} "
                f"{config.block_n}x{config.block_m}{flags} warps {config.warps} stages {config.stages}"
                f"{' free' if 'maxnreg' in made.options else ''}"
            )
            yield Variant(name, gpu.target, made)


def _codebooks(gpu: Gpu) -> Iterator[Variant]:
    """What products of codebooks launch: one with a magnitude for every 64 values (NF4), and one for each row."""
    seen = set()
    for (n, k), m, label, per_row in itertools.product(SHAPES, BUCKETS, HALF, (False, True)):
        group = k if per_row else 64
        config = rule(gpu, 4, m, n, k, group, True)
        config = replace(config, programs_k=min(config.programs_k, 2))
        if config.family == "dense" or k % group:
            continue
        made = product(config, 4, m, n, k, group, False, HALF[label], gpu.backend, True, n if per_row else 1)
        code = f"{made.constexprs} {made.options}"
        name = (
            f"codebook {config.family} {label} {config.block_n}x{config.block_m} {'of rows' if per_row else 'of all'}"
        )
        flags = f"programs_k {config.programs_k} even_k {made.constexprs.get('EVEN_K')} warps {config.warps}"
        if (label, code) not in seen:
            seen.add((label, code))
            yield Variant(f"{name} {flags} stages {config.stages}", gpu.target, made)


def routed_choices(gpu: Gpu) -> Iterator[tuple[Config, int, int, int, int, int, int, bool]]:
    """As `choices`, of stacked experts: configuration, bits, rows, experts, shape [n, k], group size, pairs or not."""
    seen = set()
    for bits, group_size, (experts, (n, k)), m in itertools.product(TILE, (128, 32), EXPERTS, (8, *ROUTED)):
        pairs = m == 8
        config = routed_rule(gpu, bits, m, experts, n, k, group_size, False, pairs)
        side_by_side = config.warps if config.family == "few_rows" else 1
        even = config.family != "one_row" and k % (TILE[bits] * side_by_side) == 0
        kind = bits, group_size, even, pairs, config
        if config.family != "dense" and kind not in seen:
            seen.add(kind)
            yield config, bits, m, experts, n, k, group_size, pairs


def routed(
    config: Config, bits: int, m: int, experts: int, n: int, k: int, group_size: int, pairs: bool, zeros: bool,
    dtype: torch.dtype, backend: str, codebooks: int = 0, biased: bool = True,
) -> Launch:  # fmt: skip
    """As `product`, the launch of a product of m rows that are routed to stacked experts."""
    one = _planes(bits, n, k, group_size, zeros, dtype)
    weight = _stacked(_looked_up(one, codebooks) if codebooks else one, experts)
    if pairs:
        routing, listed = Routing(chosen=_meta(torch.int64, 1, m)), _meta(torch.int64, m)
    else:
        routing, listed = Routing(_meta(torch.int32, experts)), _meta(torch.int32, m, 3)
    x, y = _meta(dtype, m // routing.choices, k), _meta(dtype, m, n)
    bias = _meta(dtype, experts, n) if biased else None
    return integers.build(config, m, x, weight, bias, y, backend, routing, listed)


def launch_of(
    config: Config, bits: int, m: int, n: int, k: int, group_size: int, zeros: bool, dtype: torch.dtype, backend: str,
    kind: Kind,
) -> Launch:  # fmt: skip
    """`product` or `routed` without biases, as `llmq_kernels.tune` measures them."""
    codebooks = {"": 0, "all": 1, "rows": n}[kind.codebook]
    if not kind.experts:
        return product(config, bits, m, n, k, group_size, zeros, dtype, backend, codebooks=codebooks)
    shape = kind.experts, n, k, group_size, kind.pairs
    return routed(config, bits, m, *shape, zeros, dtype, backend, codebooks, biased=False)


def _routed(gpu: Gpu) -> Iterator[Variant]:
    """Products of experts, with zero points in bfloat16 and without in float16: each of them is in `_integers`, too."""
    common = {"BITS", "GROUP", "RUN", "BLOCK_M", "BLOCK_N", "BACKEND", "PER_ROW", "PROGRAMS_K"}
    for config, bits, m, experts, n, k, group_size, pairs in routed_choices(gpu):
        for (label, dtype), zero in zip(HALF.items(), (True, False), strict=True):
            made = routed(config, bits, m, experts, n, k, group_size, pairs, zero, dtype, gpu.backend)
            flags = "".join(f" {name.lower()} {value}" for name, value in made.constexprs.items() if name not in common)
            kind = f"{label}{' zero' if zero else ''} {config.block_n}x{config.block_m}{flags}"
            name = f"experts {config.family} {bits} bits group {made.constexprs['GROUP']} {kind}"
            free = " free" if "maxnreg" in made.options else ""
            yield Variant(f"{name} warps {config.warps} stages {config.stages}{free}", gpu.target, made)
    for per_row, pairs in itertools.product((False, True), (False, True)):
        n, k, m = 2048, 768, 8 if pairs else 128
        group = k if per_row else 64
        config = routed_rule(gpu, 4, m, 128, n, k, group, True, pairs)
        codebooks = n if per_row else 1
        made = routed(config, 4, m, 128, n, k, group, pairs, False, torch.bfloat16, gpu.backend, codebooks)
        name = f"experts codebook {config.family} {'of rows' if per_row else 'of all'}{' pairs' if pairs else ''}"
        yield Variant(name, gpu.target, made)
    for block_m, experts in ((8, 8), (128, 256)):
        blocks = _meta(torch.int32, 128, 3)
        made = routes.build(_meta(torch.int32, experts), blocks, 1000, block_m, gpu.pdl, gpu.backend)
        yield Variant(f"experts blocks of {block_m}, {experts} experts", gpu.target, made)


def _dequantize(gpu: Gpu) -> Iterator[Variant]:
    for bits, group_size in itertools.product(TILE, (128, 32)):
        weight = _planes(bits, 4096, 4096, group_size, True, torch.bfloat16)
        made = dequantize.build(weight, _meta(torch.bfloat16, 4096, 4096), gpu.backend)
        yield Variant(f"dequantize {bits} bits group {group_size} zero", gpu.target, made)
    weight = _stacked(weight, 8)
    made = dequantize.build(weight, _meta(torch.bfloat16, 8, 4096, 4096), gpu.backend, _meta(torch.int32, 8))
    yield Variant(f"dequantize experts of {weight.bits} bits", gpu.target, made)
    for rows in (1, 4096):
        weight = _looked_up(_planes(4, 4096, 4096, 64, False, torch.bfloat16), rows)
        made = dequantize.build(weight, _meta(torch.bfloat16, 4096, 4096), gpu.backend)
        yield Variant(f"dequantize {'one codebook' if rows == 1 else 'codebooks of rows'}", gpu.target, made)


def _sums(gpu: Gpu) -> Iterator[Variant]:
    for programs_k in (2, 4, 8):
        parts, bias = _meta(torch.float32, programs_k, 8, 4096), _meta(torch.bfloat16, 4096)
        made = sums.build(parts, bias, _meta(torch.bfloat16, 8, 4096), gpu.pdl, gpu.backend)
        yield Variant(f"sum {programs_k}", gpu.target, made)


def _inputs(gpu: Gpu) -> Iterator[Variant]:
    kinds = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
    for kind, label, static, k in itertools.product(kinds, HALF, (False, True), (256, 4096, 14336)):
        known = _meta(torch.float32, 1) if static else None
        codes, scale = _meta(kinds[kind], 15, k), _meta(torch.float32, 15)
        made = inputs.build(_meta(HALF[label], 15, k), known, codes, scale, gpu.backend)
        name = f"{kind} round {'static' if static else 'token'} {label} block {made.constexprs['BLOCK']}"
        yield Variant(name, gpu.target, made)


def _int8(gpu: Gpu) -> Iterator[Variant]:
    for label, dtype in HALF.items():
        for m, n in ((15, 4096), (15, 14336), (31, 4096), (63, 4096), (127, 4096)):
            weight = PackedInt8(_meta(torch.int8, n, 4096), _meta(torch.float32, n, 1), None)
            codes, scale, bias = _meta(torch.int8, m, 4096), _meta(torch.float32, m), _meta(dtype, n)
            made = int8.build(codes, scale, weight, bias, _meta(dtype, m, n), gpu.backend)
            yield Variant(f"int8 product {label} rows {m} tile {made.constexprs['BLOCK_N']}", gpu.target, made)


def _columns(gpu: Gpu) -> Iterator[Variant]:
    """What quantizing launches: columns of weights rounded, with and without zero points, and codes moved."""
    many, square = _meta(torch.float32, columns.COLUMNS, 4096), _meta(torch.float32, columns.COLUMNS, 4096)[:, :128]
    for name, zero, steps in (("", None, None), (" zero", many, None), (" moved", None, many)):
        made = columns.build(many, square, many, zero, steps, many, many, -8, 7)
        yield Variant(f"columns{name}", gpu.target, made)
