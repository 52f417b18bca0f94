"""llmq's own folder of llama.cpp's blocks, which `llmq export --to gguf` puts into a GGUF file as they are.

No standard of transformers' has scales of two levels. As in `codebook`, the configuration is compressed-tensors' with
a `format` that only llmq knows, so stock transformers refuses the folder. A weight [out, in] is stored as
`weight_blocks`, uint8 [out, bytes of a row], in the type that its grid's name says; llmq reads it dense.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Groups, Loader, Row, Spec, Unclear, dtype_name
from llmq.formats.dequantized import Coded, damaged, pieces
from llmq.formats.gguf import blocks, kquants
from llmq.formats.gguf.types import TYPES, BlockType
from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.kquants import KWeight
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.grids.table import GRIDS

BLOCKS = "weight_blocks"
FORMAT = "llmq-blocks"
ONE_SCHEME = False
OWN = True


def kind_of(scheme: Scheme) -> BlockType:
    """The type of a scheme's blocks."""
    return TYPES[scheme.grid.upper()]


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    (rows, width), kind = shape, kind_of(scheme)
    if width == 0 or width % kind.values:
        raise LlmqError(f"blocks of {kind.values} inputs do not divide the {width} of the weight")
    return {BLOCKS: (torch.uint8, (rows, width // kind.values * kind.nbytes))}


def pack(q: Quantized) -> dict[str, Tensor]:
    """See `Format.pack`."""
    if isinstance(q, KWeight):
        return {BLOCKS: kquants.pack(q)}
    if not isinstance(q, QuantizedWeight) or q.scheme.rules.layout:
        raise LlmqError(f"a {q.scheme} weight needs the two levels of its scales: return it by `Rounding.finish`")
    return {BLOCKS: blocks.pack(kind_of(q.scheme).name, q)}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> KWeight | QuantizedWeight:
    """See `Format.unpack`."""
    if BLOCKS not in tensors:
        raise LlmqError(f"a {scheme} weight needs {BLOCKS}, not in the checkpoint")
    stored, kind = tensors[BLOCKS], kind_of(scheme)
    if stored.dtype != torch.uint8 or stored.dim() != 2 or stored.shape[1] % kind.nbytes or not stored.numel():
        raise LlmqError(
            f"{BLOCKS} of a {scheme} weight must be uint8 with rows of blocks of {kind.nbytes} bytes, not "
            f"{dtype_name(stored.dtype)} {[*stored.shape]}"
        )
    if scheme.rules.layout:
        return kquants.unpack(stored, scheme)
    scale = blocks.scales(stored, kind)
    value = blocks.unpack(kind.name, stored).view(*scale.shape, -1)
    codes = (value / scale.unsqueeze(-1)).nan_to_num_(0, 0, 0).round_().to(torch.int8).flatten(1)
    return QuantizedWeight(codes, scale, None, scheme)


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`."""
    size = shape[1 if row_parallel else 0]
    return size % parts == 0 and (not row_parallel or size // parts % kind_of(scheme).values == 0)


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
    return "llama.cpp's blocks"


def refuse_experts(scheme: Scheme) -> str | None:
    """See `Format`: experts that are stored one by one are read as any weight."""
    return None


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """See `Format.loaders`."""
    sentence = (
        "`llmq export FOLDER --to gguf` makes it a file for llama.cpp; of the folder itself only llmq reads the "
        "weights (dense: llmq.load, `llmq eval` and `llmq generate`), and stock transformers refuses it"
    )
    return [Loader(sentence, code="llmq", warn=True)]


def schemes_of(section: Mapping[str, Any]) -> dict[str, Scheme]:
    """Module → its scheme, by config.json. Raises LlmqError for a grid that is not known."""
    found: dict[str, Scheme] = {}
    for group in (section.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        name = str(weights.get("grid")) if isinstance(weights, Mapping) else "nothing"
        if name not in GRIDS or GRIDS[name].format != __name__.rpartition(".")[2]:
            raise LlmqError(f"config.json: weights are {name!r}, which this llmq does not know in {FORMAT} folders")
        found |= dict.fromkeys(group.get("targets") or (), changed_scheme({"grid": name}, Scheme(), "config.json"))
    return found


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether a folder is of this format."""
    return section.get("format") == FORMAT


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """No: it refuses the folder."""
    return False


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored as blocks. Raises LlmqError if its bytes are no whole blocks."""
    schemes = schemes_of(section)
    names = (name for name in source.names() if name.endswith(f".{BLOCKS}"))
    return [_coded(source, name, schemes, dtype) for name in names]


def _coded(source: Source, name: str, schemes: Mapping[str, Scheme], dtype: torch.dtype) -> Coded:
    stem = name.removesuffix(f".{BLOCKS}")
    if stem not in schemes:
        raise damaged(source, name, "is stored as blocks, and config.json does not say of which type")
    scheme = schemes[stem]
    try:
        rows, width = shape_of(source.info(name), scheme)
    except Unclear as unclear:
        raise damaged(source, name, f"does not fit: {unclear}") from unclear

    def some(start: int, stop: int) -> Tensor:
        value = torch.empty(stop - start, width, dtype=dtype)
        for begin, end in pieces((rows, width), start, stop):
            found = unpack({BLOCKS: source.read_rows(name, begin, end)}, scheme)
            value[begin - start : end - start] = found.dequantize(dtype)
        return value

    return Coded(f"{stem}.weight", (rows, width), (name,), some)


def shape_of(info: TensorInfo, scheme: Scheme) -> tuple[int, int]:
    """[out, in] of stored blocks. Raises Unclear if they are no whole blocks."""
    kind = kind_of(scheme)
    if info.dtype != torch.uint8 or len(info.shape) != 2 or info.shape[1] % kind.nbytes:
        raise Unclear(f"blocks {dtype_name(info.dtype)} {[*info.shape]} of {kind.nbytes} bytes each")
    return info.shape[0], info.shape[1] // kind.nbytes * kind.values


COMPANIONS: dict[str, tuple[str, ...]] = {BLOCKS: ()}
SCALES = (BLOCKS,)


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a weight, from the headers of its tensors. Raises Unclear if they do not fit."""
    try:
        scheme = schemes_of(config).get(module)
    except (LlmqError, KeyError, TypeError) as error:
        raise Unclear(str(error)) from error
    if scheme is None:
        raise Unclear("blocks whose type config.json does not say")
    info = parts[BLOCKS]
    name, shape, kind = f"{module}.weight", shape_of(info, scheme), kind_of(scheme)
    return Row(name, shape, kind.name, scheme.bits, scheme.group_size, scheme.symmetric, None, info.nbytes, kind.name)
