"""AQLM's folders (Egiazarian et al. 2024): written as stock transformers with the package aqlm reads them; read packed.

`codes` [out/og, in/ig, M] integers, `codebooks` [M, 2^n, og, ig], `scales` [out/og, 1, 1, 1]: a tile of og × ig weights
is its scale times the sum of one entry of each codebook. Codes of 8 bits are int8, longer ones int16 or int32, and
negative where an unsigned number would not fit. What is written has one row in a tile. Tried with transformers 5.23 and
aqlm 1.1.7 on a CPU: logits are those of the dequantized weights, in float32; in any other dtype its CPU kernel fails.
llmq's kernels run tiles of one row with codes of 8 bits; other folders are read dense.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Groups, Loader, Row, Spec, Unclear, dtype_name, whole
from llmq.formats.dequantized import Coded, damaged, pieces
from llmq.formats.plain import FLOATS, Configuration, Entry, VectorsWeight
from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight, books_of

CODES, BOOKS, SCALE = "codes", "codebooks", "scales"
ONE_SCHEME = True
REPLACES_MODULES = True
PACKAGES = {"aqlm": "aqlm"}
COMPANIONS = {CODES: (BOOKS, SCALE)}
SCALES = (BOOKS,)
USUAL = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}
"""What transformers takes for keys that a configuration lacks."""
INTEGERS = (torch.int8, torch.int16, torch.int32)
ENTRIES = 256
"""Of a codebook whose codes are bytes."""


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    rows, width = shape
    count, entries, size = books_of(scheme)
    if width == 0 or width % size:
        raise LlmqError(f"group size {size} does not divide the {width} inputs of the weight")
    return {
        CODES: (torch.int8, (rows, width // size, count)),
        BOOKS: (scale_dtype, (count, entries, 1, size)),
        SCALE: (scale_dtype, (rows, 1, 1, 1)),
    }


def pack(q: VQWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    return {CODES: q.codes.view(torch.int8), BOOKS: q.codebooks[:, :, None], SCALE: q.scale.view(-1, 1, 1, 1)}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> VQWeight:
    """See `Format.unpack`."""
    missing = [suffix for suffix in (CODES, BOOKS, SCALE) if suffix not in tensors]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    codes, books, scale = tensors[CODES], tensors[BOOKS], tensors[SCALE]
    if codes.dim() != 3:
        raise LlmqError(f"{CODES} of a {scheme} weight has three axes, not {[*codes.shape]}")
    shape = codes.shape[0], codes.shape[1] * books_of(scheme)[2]
    for suffix, (kind, wanted) in spec(shape, scheme, books.dtype).items():
        found = tensors[suffix]
        if found.dtype != kind or tuple(found.shape) != wanted:
            raise LlmqError(
                f"{suffix} of a {scheme} weight [{shape[0]}, {shape[1]}] must be {kind} {[*wanted]}, "
                f"not {found.dtype} {[*found.shape]}"
            )
    return VQWeight(codes.view(torch.uint8), books[:, :, 0], scale.view(-1), scheme)


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`."""
    return (shape[1] // books_of(scheme)[2] if row_parallel else shape[0]) % parts == 0


def config(groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """See `Format.config`."""
    schemes = [scheme for scheme, names in groups.items() if names]
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    if len(schemes) > 1:
        raise LlmqError(f"AQLM has one scheme in a checkpoint, not {' and '.join(map(str, schemes))}")
    left = sorted(set(ignore))
    # Matched as transformers does: as a prefix, as a regular expression, and as a suffix.
    for key in left:
        start = re.compile(rf"(?:{key})(?:(?<=\.)|(?=\.|$))")
        for name in groups[schemes[0]]:
            if start.match(name) or name.endswith(key):
                raise LlmqError(
                    f"transformers would also skip {name} if {key} is not quantized: --keep both, or quantize both"
                )
    count, _, size = books_of(schemes[0])
    return {
        "quant_method": "aqlm",
        "in_group_size": size,
        "out_group_size": 1,
        "num_codebooks": count,
        "nbits_per_codebook": schemes[0].rules.vector_code,
        "linear_weights_not_to_quantize": left,
    }


def refuse_experts(scheme: Scheme) -> str | None:
    """Why transformers 5.23 could not load a mixture's experts: it replaces modules that are linear, and has one
    parameter for all experts."""
    return (
        f"transformers does not find the codes of experts as {scheme} in an AQLM folder, and would fill the experts "
        "with random numbers: use --packing llmq, for a folder that only llmq.load reads"
    )


def refuse_stacks(scheme: Scheme) -> str | None:
    """Why `llmq.load` could not keep packed what was a stack of experts: such a folder has no place for a mark that
    makes transformers refuse it."""
    return f"an AQLM folder does not hold experts as {scheme}: use --packing llmq"


def title(schemes: Collection[Scheme]) -> str:
    """See `Format.title`."""
    return "AQLM"


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """See `Format.loaders`."""
    return [
        Loader("llmq.load runs it packed; `llmq eval` without --kernels makes it dense", code="llmq"),
        Loader("stock transformers with aqlm[cpu] reads it: on a CPU in float32 only, so ask for dtype='float32'"),
    ]


def loaded_bytes(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of a weight on llmq's kernels; dtype: of scales."""
    return VectorsWeight.nbytes(*shape, books_of(scheme), dtype)


@dataclass(frozen=True)
class AqlmLayer:
    """The stored tensors of one weight; see `plain.Layer`. count: codebooks; size: weights of a vector."""

    shape: tuple[int, int]
    count: int
    size: int

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        return {
            CODES: Entry((torch.int8,), (rows, width // self.size, self.count)),
            BOOKS: Entry(FLOATS, (self.count, ENTRIES, 1, self.size)),
            SCALE: Entry(FLOATS, (rows, 1, 1, 1)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> VectorsWeight:
        packed = tensors[CODES].view(torch.uint8).permute(2, 1, 0).unsqueeze(1).contiguous()
        table = tensors[BOOKS][:, :, 0].to(torch.float32)
        return VectorsWeight(packed, table, tensors[SCALE].view(1, -1), self.shape[1])


class AqlmReader:
    """Reads such folders for llmq's kernels; config: transformers' own AqlmConfig."""

    suffixes = (CODES, BOOKS, SCALE, "bias")

    def __init__(self, config: Configuration) -> None:
        self.count, self.size = int(config.num_codebooks), int(config.in_group_size)

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq's kernels cannot read such checkpoints, or None."""
        return _unpacked(vars(config))

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> AqlmLayer | None:
        """See `plain.Reader.layer`."""
        info = next((stored[suffix] for suffix in (CODES, BOOKS) if suffix in stored), None)
        if info is None:
            return None
        if shape[1] % self.size:
            raise LlmqError(f"{info.file}: {name} has {shape[1]} inputs, and config.json says groups of {self.size}")
        return AqlmLayer(shape, self.count, self.size)


def runs_packed(section: Mapping[str, Any]) -> bool:
    """Whether llmq's kernels run such a folder: else it is dequantized."""
    return _unpacked(section) is None


def _unpacked(section: Mapping[str, Any]) -> str | None:
    """Why llmq's kernels do not run weights of a configuration, in a clause, or None."""
    sizes = {key: section.get(key, usual) for key, usual in USUAL.items()}
    for key, wanted in (("nbits_per_codebook", 8), ("out_group_size", 1)):
        if sizes[key] != wanted:
            return f"llmq's kernels run folders with {key} {wanted}, not {sizes[key]}"
    whole_sizes = isinstance(sizes["in_group_size"], int) and isinstance(sizes["num_codebooks"], int)
    return None if whole_sizes and min(sizes.values()) > 0 else f"its sizes are {sizes}"


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of its tensors. Raises Unclear if they do not fit."""
    codes, books = parts[CODES], parts[BOOKS]
    shape = _shape(codes, books, parts.get(SCALE))
    tile, stored = books.shape[2] * books.shape[3], books.shape[0] * (books.shape[1] - 1).bit_length()
    if stored % tile:
        raise Unclear(f"{stored} bits for {tile} weights: no whole number for each")
    nbytes = sum(part.nbytes for part in parts.values())
    return Row(
        f"{module}.weight", shape, "vq", stored // tile, books.shape[3], True, None, nbytes, dtype_name(codes.dtype)
    )


def _shape(codes: TensorInfo, books: TensorInfo, scales: TensorInfo | None) -> tuple[int, int]:
    """The shape of a weight. Raises Unclear if the tensors that store it do not fit each other."""
    told = f"{dtype_name(codes.dtype)} {[*codes.shape]} with codebooks {[*books.shape]}"
    if codes.dtype not in INTEGERS or books.dtype not in FLOATS or len(codes.shape) != 3 or len(books.shape) != 4:
        raise Unclear(told)
    rows, columns, count = codes.shape
    entries, tall, wide = books.shape[1:]
    if books.shape[0] != count or entries & (entries - 1) or entries < 2 or entries > 1 << 8 * codes.dtype.itemsize:
        raise Unclear(told)
    if scales is None or scales.shape != (rows, 1, 1, 1) or scales.dtype not in FLOATS:
        raise Unclear(f"{told} and {'no scales' if scales is None else f'scales {[*scales.shape]}'}")
    return rows * tall, columns * wide


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether a folder's weights are AQLM's."""
    return method == "aqlm"


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """No: it needs a package, and on a CPU multiplies one token at a time."""
    return False


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored as codes. Raises LlmqError if its tensors, or config.json, do not fit them."""
    names = set(source.names())
    found = []
    for name in source.names():
        stem = name.removesuffix(f".{CODES}")
        if stem != name and f"{stem}.{BOOKS}" in names:
            found.append(_coded(source, section, dtype, stem, names))
    return found


def _coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype, stem: str, names: set[str]) -> Coded:
    parts = (f"{stem}.{CODES}", f"{stem}.{BOOKS}", f"{stem}.{SCALE}")
    infos = [source.info(part) if part in names else None for part in parts]
    try:
        shape = _shape(infos[0], infos[1], infos[2])  # type: ignore[arg-type]
    except Unclear as unclear:
        raise damaged(source, parts[0], f"does not fit: {unclear}") from unclear
    books = source.info(parts[1]).shape
    for key, value in zip(
        ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size"),
        (books[0], (books[1] - 1).bit_length(), books[2], books[3]),
        strict=True,
    ):
        if whole(section, key) not in (None, value):
            raise damaged(source, parts[0], f"has {key} {value}, and config.json says {section[key]}")
    return Coded(f"{stem}.weight", shape, parts, partial(_rows, source, parts, shape, dtype))


def _rows(
    source: Source, parts: tuple[str, str, str], shape: tuple[int, int], dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """Some rows of a weight, dequantized in float32."""
    books = source.read(parts[1]).float()
    count, entries, tall, wide = books.shape
    value = torch.empty(stop - start, shape[1], dtype=dtype)
    for begin, end in pieces(shape, start, stop):
        first, last = begin // tall, -(-end // tall)
        codes = source.read_rows(parts[0], first, last).int() & (entries - 1)
        sums = torch.zeros(last - first, shape[1] // wide, tall, wide)
        for number in range(count):
            sums += books[number][codes[:, :, number]]
        sums *= source.read_rows(parts[2], first, last).float()
        rows = sums.transpose(1, 2).reshape(-1, shape[1])
        value[begin - start : end - start] = rows[begin - first * tall : end - first * tall]
    return value


READERS = {"aqlm": AqlmReader}
