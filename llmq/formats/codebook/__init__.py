"""llmq's own folder: codes that are indices of levels, which are those of each row (`learned`) or of a grid (`fixed`),
or of the entries of codebooks (`vectors`).

No standard holds them. An unknown `quant_method` would make stock transformers fill the weights with random numbers, so
the configuration is compressed-tensors' with a `format` that only llmq knows: transformers then refuses the folder, and
its error names the format (`llmq-codebook`; vLLM 0.32 refuses its key `grid`). `restored` is the configuration as
llmq's reader sees it. Beside what those files describe, every weight [out, in] has a `weight_shape`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Groups, Loader, Row, Spec, Unclear, dtype_name, whole
from llmq.formats.codebook import fixed, learned, vectors
from llmq.formats.codebook.fixed import TRITS, Fixed, FixedLayer
from llmq.formats.codebook.learned import CODES, LEVELS, SCALE, SHAPE, Learned, LearnedLayer
from llmq.formats.codebook.vectors import BOOKS, VECTORS, Vectors, VectorsLayer
from llmq.formats.dequantized import Coded, damaged, pieces
from llmq.formats.plain import Configuration
from llmq.formats.stacks import unmarked
from llmq.grids.base import Quantized
from llmq.grids.scheme import Scheme

SUFFIXES = (CODES, TRITS, VECTORS, LEVELS, BOOKS, SCALE, SHAPE)
FORMAT, METHOD = "llmq-codebook", "llmq"
WIDTHS = {1, 2, 3, 4}
ONE_SCHEME = False
OWN = True


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    return _layout(scheme).spec(shape, scheme, scale_dtype)


def pack(q: Any) -> dict[str, Tensor]:
    """See `Format.pack`."""
    return _layout(q.scheme).pack(q)


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
    """See `Format.unpack`."""
    kind = _layout(scheme)
    held = tensors.get(LEVELS if scheme.rules.learned else SCALE)
    dtype = torch.bfloat16 if held is None else held.dtype
    width = 2 * (scheme.group_size or 1)
    missing = [suffix for suffix in kind.spec((1, width), scheme, dtype) if suffix not in tensors]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    rows, width = (int(n) for n in tensors[SHAPE][:2].tolist())
    for suffix, (wanted, shape) in kind.spec((rows, width), scheme, dtype).items():
        found = tensors[suffix]
        if found.dtype != wanted or tuple(found.shape) != shape:
            raise LlmqError(
                f"{suffix} of a {scheme} weight [{rows}, {width}] must be {dtype_name(wanted)} {[*shape]}, "
                f"not {dtype_name(found.dtype)} {[*found.shape]}"
            )
    return kind.unpack(tensors, scheme)


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`: along the inputs, every part must have whole words and groups."""
    size = shape[1 if row_parallel else 0]
    if size % parts:
        return False
    return _layout(scheme).splits(size, scheme, parts) if row_parallel else size // parts % scheme.level_rows == 0


def loaded_bytes(shape: Sequence[int], scheme: Scheme, dtype: torch.dtype) -> int:
    """The bytes of a weight [out, in] on llmq's kernels; dtype: of the model."""
    rows, width = shape
    if scheme.rules.learned:
        return learned.nbytes(rows, width)
    if scheme.rules.vector_code:
        return vectors.nbytes(rows, width, scheme, dtype)
    return fixed.nbytes(rows, width, scheme, dtype)


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
            f"group_{index}": {"targets": sorted(groups[scheme]), "format": FORMAT, "weights": _told(scheme)}
            for index, scheme in enumerate(schemes)
        },
        "ignore": sorted(set(ignore)),
    }


def _told(scheme: Scheme) -> dict[str, Any]:
    """What config.json says of the weights of a scheme."""
    whole = scheme.rules.learned or scheme.rules.vector_code
    bits = scheme.bits if whole else fixed.bits_of(len(fixed.levels_of(scheme)))
    told = {"grid": scheme.grid, "num_bits": bits, "group_size": scheme.group_size}
    return told | ({"level_rows": scheme.level_rows} if scheme.level_rows > 1 else {})


def refuse_experts(scheme: Scheme) -> str | None:
    """None: llmq reads a mixture's experts that are stored one by one as it reads any weight."""
    return None


def refuse_stacks(scheme: Scheme) -> str | None:
    """None: so are those that llmq stores one by one."""
    return None


def title(schemes: Collection[Scheme]) -> str:
    """See `Format.title`."""
    return "llmq codebooks"


def loaders(schemes: Collection[Scheme]) -> list[Loader]:
    """See `Format.loaders`."""
    sentence = (
        "only llmq reads it (llmq.load packed; `llmq eval` and `llmq generate`): no standard format holds its codes; "
        "stock transformers refuses the folder; `llmq export --to dense` writes it for other tools"
    )
    return [Loader(sentence, code="llmq", warn=True)]


def restored(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of a folder of this format with `quant_method` as llmq's readers know it; None for others.

    `alone` in it: whether experts are stored under names of llmq's own (`stacks`).
    """
    plain, alone = (section, False) if section.get("format") == FORMAT else unmarked(section)
    return {**plain, "quant_method": METHOD, "alone": alone} if plain.get("format") == FORMAT else None


class Told(NamedTuple):
    """What config.json says of a weight: the bits of its codes, its group size (0: one for each row), and how many rows
    share levels."""

    bits: int
    group: int
    together: int


def said(groups: Any) -> dict[str, Told]:
    """Module → what a config.json's groups say of it."""
    found: dict[str, Told] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and (bits := whole(weights, "num_bits")) is not None:
            told = Told(bits, whole(weights, "group_size") or 0, whole(weights, "level_rows") or 1)
            found |= dict.fromkeys(group.get("targets") or (), told)
    return found


class CodebookReader:
    """Reads such folders for llmq's kernels; config: the section as `restored` gives it, as attributes."""

    suffixes = (*SUFFIXES, "bias")

    def __init__(self, config: Configuration) -> None:
        self.said = said(config.config_groups)

    @staticmethod
    def refusal(config: Configuration) -> str | None:
        """Why llmq cannot read such checkpoints, or None."""
        groups = getattr(config, "config_groups", None)
        if not isinstance(groups, Mapping):
            return "its config.json has no config_groups"
        widths = {group.get("weights", {}).get("num_bits") for group in groups.values()}
        return None if widths <= WIDTHS else f"its codes have {', '.join(map(str, widths))} bits"

    def layer(
        self, name: str, module: nn.Module, shape: tuple[int, int], stored: Mapping[str, TensorInfo]
    ) -> LearnedLayer | FixedLayer | VectorsLayer | None:
        """See `plain.Reader.layer`."""
        info = next((stored[suffix] for suffix in (CODES, TRITS, VECTORS, LEVELS, BOOKS) if suffix in stored), None)
        if info is None:
            return None
        # The name in the file: a class may have another prefix than the one that was quantized.
        told = self.said.get(info.name.rpartition(".")[0], self.said.get(name))
        if told is None:
            raise LlmqError(f"{info.file}: config.json says that {name} is not quantized, but {info.name} is stored")
        bits, group, together = told
        if info.name.endswith((VECTORS, BOOKS)):
            if not group or shape[1] % group or bits * group % vectors.BITS:
                raise LlmqError(f"{info.file}: {name} has {shape[1]} inputs, and config.json says groups of {group}")
            return VectorsLayer(shape, bits * group // vectors.BITS, group)
        levels = stored.get(LEVELS)
        if together > 1 or (SCALE not in stored and (levels is None or len(levels.shape) != 1)):
            return LearnedLayer(shape, bits, together)
        count = levels.shape[0] if levels is not None and len(levels.shape) == 1 else 1 << bits
        if count < 2 or fixed.bits_of(count) != bits:
            raise LlmqError(f"{info.file}: {name} has {count} levels, and config.json says {bits} bits")
        if shape[1] % (group or shape[1]):
            raise LlmqError(f"{info.file}: {name} has {shape[1]} inputs, and config.json says groups of {group}")
        return FixedLayer(shape, count, group or shape[1])


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether a folder is of this format."""
    return section.get("format") == FORMAT


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """No: it refuses the folder."""
    return False


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored as codes. Raises LlmqError if its tensors, or config.json, do not fit them."""
    names, told = set(source.names()), said(section.get("config_groups"))
    return [
        _coded(source, stem, suffix, told, dtype, names)
        for stem, _, suffix in (name.rpartition(".") for name in source.names())
        if suffix in (CODES, TRITS, VECTORS)
    ]


def _coded(
    source: Source, stem: str, suffix: str, told: Mapping[str, Told], dtype: torch.dtype, names: set[str]
) -> Coded:
    scaled = suffix in (TRITS, VECTORS) or f"{stem}.{SCALE}" in names
    parts = (suffix, BOOKS if suffix == VECTORS else LEVELS, *((SCALE,) if scaled else ()), SHAPE)
    missing = [f"{stem}.{part}" for part in parts if f"{stem}.{part}" not in names]
    first = f"{stem}.{suffix}"
    if missing:
        raise damaged(source, first, f"is stored as codes, and {', '.join(missing)} is missing")
    if stem not in told:
        raise damaged(source, first, "is stored as codes, and config.json says that it is not quantized")
    try:
        weight = _stored(source, {part: source.info(f"{stem}.{part}") for part in parts})
        _agree(weight, told[stem])
    except Unclear as unclear:
        raise damaged(source, first, f"does not fit: {unclear}") from unclear
    name = f"{stem}.weight"
    return Coded(name, weight.shape, tuple(f"{stem}.{part}" for part in parts), partial(_rows, weight, dtype))


def _rows(weight: Learned | Fixed | Vectors, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Some rows of a stored weight. Raises LlmqError for codes that stand for no level."""
    value = torch.empty(stop - start, weight.shape[1], dtype=dtype)
    try:
        for begin, end in pieces(weight.shape, start, stop):
            value[begin - start : end - start] = weight.rows(begin, end, dtype)
    except Unclear as unclear:
        raise damaged(weight.source, weight.codes, f"is damaged: {unclear}") from unclear
    return value


def _stored(source: Source, parts: Mapping[str, TensorInfo]) -> Learned | Fixed | Vectors:
    """A weight, from its tensors. Raises Unclear if they do not fit each other."""
    shape = parts[SHAPE]
    if VECTORS in parts and shape.shape == (2,):
        rows, width = (int(n) for n in source.read(shape.name).tolist())
        return vectors.found(source, parts, (rows, width))
    if LEVELS not in parts:
        raise Unclear(f"{LEVELS} is missing")
    levels, shared = parts[LEVELS], shape.shape == (3,)
    learnt = shared or SCALE not in parts
    if shape.shape not in ((2,), (3,)) or len(levels.shape) != (2 if learnt else 1):
        raise Unclear(f"levels {[*levels.shape]} and shape {[*shape.shape]}")
    rows, width, *together = (int(n) for n in source.read(shape.name).tolist())
    if learnt:
        return learned.found(source, parts, (rows, width), *together)
    return fixed.found(source, parts, (rows, width))


def _agree(weight: Learned | Fixed | Vectors, told: Told) -> None:
    """Raises Unclear if config.json says something else of a weight than its tensors do."""
    bits, group, rows = told
    together = weight.together if isinstance(weight, Learned) else 1
    if together != rows:
        raise Unclear(f"levels of {together} rows, and config.json says {rows}")
    if weight.bits != bits:
        raise Unclear(f"its codes are of {weight.bits} bits, and config.json says {bits} bits")
    if weight.group != (0 if group == weight.shape[1] else group):
        one, other = (f"groups of {size}" if size else "one scale for each row" for size in (weight.group, group))
        raise Unclear(f"it has {one}, and config.json says {other}")


class _Layout(Protocol):
    """The interface of `learned`, `fixed` and `vectors`."""

    def spec(self, shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec: ...

    def pack(self, q: Any) -> dict[str, Tensor]: ...

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized: ...

    def splits(self, width: int, scheme: Scheme, parts: int) -> bool: ...


def _layout(scheme: Scheme) -> _Layout:
    """The module that stores a scheme."""
    if scheme.rules.vector_code:
        return vectors
    return learned if scheme.rules.learned else fixed


READERS = {METHOD: CodebookReader}
COMPANIONS = {CODES: (LEVELS, SCALE, SHAPE), TRITS: (LEVELS, SCALE, SHAPE), VECTORS: (BOOKS, SCALE, SHAPE)}
SCALES = (LEVELS, BOOKS)


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a weight, from the headers of its tensors. Raises Unclear if they do not fit, or contradict
    config.json."""
    if SHAPE not in parts:
        raise Unclear(f"{SHAPE} is missing")
    weight = _stored(source, parts)
    told = said(config.get("config_groups")).get(module)
    if told is not None:
        _agree(weight, told)
    nbytes = sum(info.nbytes for info in parts.values())
    kind = dtype_name(source.info(weight.codes).dtype)
    title = "vq" if isinstance(weight, Vectors) else "codebook"
    return Row(
        f"{module}.weight", weight.shape, title, weight.bits, weight.group, True, None, nbytes, kind,
        holds=weight.holds,
    )  # fmt: skip
