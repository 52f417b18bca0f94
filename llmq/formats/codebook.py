"""llmq's own folder: codes that are indices of levels, and the levels of each row.

No standard holds them. An unknown `quant_method` would make stock transformers fill the weights with random numbers, so
the configuration is compressed-tensors' with a `format` that only llmq knows: transformers then refuses the folder, and
its error names the format (`llmq-codebook`; vLLM 0.32 refuses its key `grid`). `restored` is the configuration as
llmq's reader sees it.

A weight [out, in] is stored as `weight_codes`, a dense stream of bits as compressed-tensors packs integers, as
`weight_levels` [out, 2^bits] in the model's dtype, and `weight_shape`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Groups, Loader, Row, Spec, Unclear, dtype_name
from llmq.formats.dequantized import Coded, damaged, pieces
from llmq.formats.packing import pack_codes, packed_width, unpack_codes
from llmq.formats.plain import FLOATS, Configuration, Entry, LevelsWeight
from llmq.grids.base import QuantizedWeight, check_range
from llmq.grids.scheme import Scheme

CODES, LEVELS, SHAPE = "weight_codes", "weight_levels", "weight_shape"
SUFFIXES = (CODES, LEVELS, SHAPE)
FORMAT, METHOD = "llmq-codebook", "llmq"
ONE_SCHEME = False
OWN = True


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    rows, width = shape
    check_range("mse", scheme, width)
    return {
        CODES: (torch.int32, (rows, packed_width(width, scheme.bits))),
        LEVELS: (scale_dtype, (rows, 1 << scheme.bits)),
        SHAPE: (torch.int64, (2,)),
    }


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    if q.levels is None:
        raise LlmqError(f"a {q.scheme} weight needs the levels of its rows: return it by `Rounding.finish`")
    return {
        CODES: pack_codes(q.codes.to(torch.int8) - (1 << (q.scheme.bits - 1)), q.scheme.bits),
        LEVELS: q.levels.to(q.scale.dtype).contiguous(),
        SHAPE: torch.tensor(q.codes.shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """See `Format.unpack`."""
    missing = [suffix for suffix in SUFFIXES if suffix not in tensors]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    rows, width = (int(n) for n in tensors[SHAPE].tolist())
    levels = tensors[LEVELS]
    for suffix, (dtype, shape) in spec((rows, width), scheme, levels.dtype).items():
        found = tensors[suffix]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise LlmqError(
                f"{suffix} of a {scheme} weight [{rows}, {width}] must be {dtype_name(dtype)} {[*shape]}, "
                f"not {dtype_name(found.dtype)} {[*found.shape]}"
            )
    signed = unpack_codes(tensors[CODES], scheme.bits, width)
    codes = (signed.to(torch.int16) + (1 << (scheme.bits - 1))).to(torch.uint8)
    scale = torch.ones(rows, 1, dtype=levels.dtype, device=levels.device)
    return QuantizedWeight(codes, scale, None, scheme, levels=levels.to(torch.float32))


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`: along the inputs, every part must have whole words."""
    size = shape[1 if row_parallel else 0]
    return size % parts == 0 and (not row_parallel or size // parts * scheme.bits % 32 == 0)


def config(groups: Groups, ignore: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """See `Format.config`."""
    schemes = [scheme for scheme, names in groups.items() if names]
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": sorted(groups[scheme]),
                "format": FORMAT,
                "weights": {"grid": scheme.grid, "num_bits": scheme.bits, "group_size": scheme.group_size},
            }
            for index, scheme in enumerate(schemes)
        },
        "ignore": sorted(set(ignore)),
    }


def title(schemes: Collection[Scheme]) -> str:
    """See `Format.title`."""
    return "llmq codebooks"


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """See `Format.loaders`."""
    sentence = (
        "only llmq reads it (llmq.load packed; `llmq eval` and `llmq generate`): no standard format holds levels of "
        "each row; stock transformers refuses the folder"
    )
    return [Loader(sentence, code="llmq", warn=True)]


def restored(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of a folder of this format with `quant_method` as llmq's readers know it; None for others."""
    return {**section, "quant_method": METHOD} if section.get("format") == FORMAT else None


@dataclass(frozen=True)
class CodebookLayer:
    """The stored tensors of one weight; see `plain.Layer`."""

    shape: tuple[int, int]
    bits: int

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        return {
            CODES: Entry((torch.int32,), (rows, packed_width(width, self.bits))),
            LEVELS: Entry(FLOATS, (rows, 1 << self.bits)),
            SHAPE: Entry((torch.int64,), (2,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> LevelsWeight:
        said = tuple(int(n) for n in tensors[SHAPE].tolist())
        if said != self.shape:
            raise LlmqError(f"{SHAPE} says {[*said]}, the model needs {[*self.shape]}")
        return LevelsWeight(tensors[CODES], tensors[LEVELS], self.bits, self.shape[1])


class CodebookReader:
    """Reads such folders for llmq's kernels; config: the section as `restored` gives it, as attributes."""

    suffixes = (*SUFFIXES, "bias")

    def __init__(self, config: Configuration) -> None:
        self.bits = {
            name: int(group["weights"]["num_bits"])
            for group in config.config_groups.values()
            for name in group["targets"]
        }

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq cannot read such checkpoints, or None."""
        groups = getattr(config, "config_groups", None)
        if not isinstance(groups, Mapping):
            return "its config.json has no config_groups"
        widths = {group.get("weights", {}).get("num_bits") for group in groups.values()}
        return None if widths <= {2, 3, 4} else f"its codes have {', '.join(map(str, widths))} bits"

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> CodebookLayer | None:
        """See `plain.Reader.layer`."""
        info = next((stored[suffix] for suffix in (CODES, LEVELS) if suffix in stored), None)
        if info is None:
            return None
        # The name in the file: a class may have another prefix than the one that was quantized.
        said = info.name.rpartition(".")[0]
        bits = self.bits.get(said, self.bits.get(name))
        if bits is None:
            raise LlmqError(f"{info.file}: config.json says that {name} is not quantized, but {info.name} is stored")
        return CodebookLayer(shape, bits)


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether a folder is of this format."""
    return section.get("format") == FORMAT


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """No: it refuses the folder."""
    return False


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored as codes. Raises LlmqError if its tensors do not fit each other."""
    names = set(source.names())
    return [
        _coded(source, name.removesuffix(f".{CODES}"), dtype, names)
        for name in source.names()
        if name.endswith(f".{CODES}")
    ]


def _coded(source: Source, stem: str, dtype: torch.dtype, names: set[str]) -> Coded:
    parts = tuple(f"{stem}.{suffix}" for suffix in SUFFIXES)
    missing = [part for part in parts if part not in names]
    if missing:
        raise damaged(source, parts[0], f"is stored as codes, and {', '.join(missing)} is missing")
    try:
        rows, width, bits = _sizes(source, parts)
    except Unclear as unclear:
        raise damaged(source, parts[0], f"does not fit: {unclear}") from unclear

    def some(start: int, stop: int) -> Tensor:
        value = torch.empty(stop - start, width, dtype=dtype)
        for begin, end in pieces((rows, width), start, stop):
            codes = unpack_codes(source.read_rows(parts[0], begin, end), bits, width).to(torch.int64)
            levels = source.read_rows(parts[1], begin, end).to(torch.float32)
            value[begin - start : end - start] = levels.gather(1, codes.add_(1 << (bits - 1)))
        return value

    return Coded(f"{stem}.weight", (rows, width), parts, some)


def _sizes(source: Source, parts: Sequence[str]) -> tuple[int, int, int]:
    """The rows, inputs and bits of a stored weight. Raises Unclear if its tensors do not fit each other."""
    codes, levels, shape = (source.info(part) for part in parts)
    if shape.shape != (2,) or len(levels.shape) != 2:
        raise Unclear(f"levels {[*levels.shape]} and shape {[*shape.shape]}")
    rows, width = (int(n) for n in source.read(parts[2]).tolist())
    bits = levels.shape[1].bit_length() - 1
    whole = codes.dtype == torch.int32 and levels.dtype in FLOATS and levels.shape == (rows, 1 << bits)
    if not whole or codes.shape != (rows, packed_width(width, bits)):
        raise Unclear(f"codes {[*codes.shape]} with levels {[*levels.shape]} for [{rows}, {width}]")
    return rows, width, bits


READERS = {METHOD: CodebookReader}
COMPANIONS = {CODES: (LEVELS, SHAPE)}
SCALES = (LEVELS,)


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a weight, from the headers of its tensors. Raises Unclear if they do not fit."""
    rows, width, bits = _sizes(source, [parts[suffix].name for suffix in SUFFIXES])
    nbytes = sum(parts[suffix].nbytes for suffix in SUFFIXES)
    return Row(f"{module}.weight", (rows, width), "codebook", bits, 0, True, None, nbytes, dtype_name(torch.int32))
