"""The safetensors format, read and written without mapping files into memory.

The safetensors package maps the file, and mapped pages count as resident memory: on a machine that cannot hold the
model, that hides how much is really needed. Here reading a tensor takes its own bytes of memory and nothing else, and
writing takes none. A file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' bytes end to
end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint import strangers
from llmq.checkpoint.store import LOCAL, Store
from llmq.errors import LlmqError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000  # the format's own limit; keeps a garbage length from being read as one
_PIECE = 1 << 24  # bytes per write and hash
_START = 1 << 16  # bytes that hold most headers, so that one read gets them


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is; begin and end are offsets from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk, and in memory once read."""
        return self.end - self.begin


def read_header(path: Path, store: Store = LOCAL) -> dict[str, TensorInfo]:
    """The tensors of one file, in the order of their bytes.

    Raises LlmqError, naming the file and if possible the tensor, if the file cannot be read, is not safetensors,
    is longer or shorter than its header says, or its header contradicts itself.
    """
    try:
        size = store.size(path)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        start = _bytes(path, 0, min(size, _START), store)
        # A real length is far below 2^32: its last four bytes are 0.
        if any(start[4:8]) and store is LOCAL and (told := strangers.of_file(path)):
            raise LlmqError(f"{path} is {told}")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or 8 + length > size:
            raise _truncated(path, f"{size} bytes, shorter than its own header")
        if length > _MAX_HEADER:
            raise LlmqError(f"{path} is not a safetensors file: its first bytes are no header length")
        raw = start[8 : 8 + length]
        raw += _bytes(path, 8 + len(raw), length - len(raw), store)
    except OSError as error:
        raise LlmqError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LlmqError(f"{path}: the header is not JSON; the file is damaged, download it again") from error
    if not isinstance(header, dict):
        raise LlmqError(f"{path}: the header is not a JSON object; the file is damaged, download it again")
    base = 8 + length
    found = [_entry(path, name, entry, base) for name, entry in header.items() if name != "__metadata__"]
    found.sort(key=lambda info: (info.begin, info.end))
    position = base
    for info in found:
        if info.begin != position:
            problem = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise LlmqError(f"{path}: tensor {info.name} {problem}; the file is damaged, download it again")
        position = info.end
    if position > size:
        raise _truncated(path, f"{size} bytes, its header says {position}")
    if position < size:
        raise LlmqError(
            f"{path} has {size - position} bytes after its last tensor; the file is damaged, download it again"
        )
    return {info.name: info for info in found}


def _bytes(path: Path, begin: int, count: int, store: Store) -> bytes:
    found = bytearray(count)
    return bytes(found[: store.read(path, begin, memoryview(found))]) if count else b""


def _truncated(path: Path, how: str) -> LlmqError:
    return LlmqError(f"{path} is truncated ({how}): download it again")


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """One tensor's entry of the header, checked on its own."""

    def wrong(what: str) -> LlmqError:
        return LlmqError(f"{path}: tensor {name} {what}; the file is damaged, download it again")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("has no dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise LlmqError(
            f"{path}: tensor {name} has dtype {kind!r}, which llmq does not read; save it as one of {', '.join(DTYPES)}"
        )
    if not _is_sizes(shape):
        raise wrong(f"has shape {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"has offsets {offsets!r}")
    wanted = DTYPES[kind].itemsize
    for size in shape:
        wanted *= size
    if offsets[1] - offsets[0] != wanted:
        raise wrong(f"{kind} {shape} needs {wanted} bytes but is given {offsets[1] - offsets[0]}")
    return TensorInfo(name, DTYPES[kind], tuple(shape), path, base + offsets[0], base + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_tensor(info: TensorInfo, store: Store = LOCAL) -> Tensor:
    """The tensor, in its own dtype, in freshly allocated memory. Raises LlmqError if the file changed or fails."""
    return _read(info, info.begin, info.shape, store)


def read_rows(info: TensorInfo, start: int, stop: int, store: Store = LOCAL) -> Tensor:
    """Rows start…stop−1 of the first dimension. Raises as read_tensor, and IndexError out of range."""
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        raise IndexError(f"rows {start}:{stop} of {info.name}, whose shape is {list(info.shape)}")
    row = info.nbytes // info.shape[0] if info.shape[0] else 0
    return _read(info, info.begin + start * row, (stop - start, *info.shape[1:]), store)


def expect(info: TensorInfo) -> None:
    """Let the system read a tensor into its cache meanwhile: a hint, which takes no memory of this process."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            fd = os.open(info.file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)


def _read(info: TensorInfo, begin: int, shape: tuple[int, ...], store: Store) -> Tensor:
    nbytes = info.dtype.itemsize
    for size in shape:
        nbytes *= size
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view: memoryview = buffer.numpy().data
    try:
        if store.read(info.file, begin, view) < nbytes:
            raise LlmqError(
                f"{info.file} became shorter while llmq was running: {info.name} cannot be read; "
                "restore the file and run the same command again"
            )
    except OSError as error:
        raise LlmqError(f"cannot read {info.name} from {info.file}: {error.strerror}") from error
    return buffer.view(info.dtype).reshape(shape)


def encode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, Iterator[memoryview]]:
    """The file that holds these tensors: its size, and its bytes piece by piece, the same for the same tensors.

    metadata: texts that are written with them.

    Tensors with wider elements come first and the header is padded, so that every tensor is aligned to its element
    size. A tensor that is not contiguous or not on the CPU is copied when it is written, one at a time. Raises
    LlmqError for a dtype that safetensors cannot hold.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise LlmqError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
        end = position + tensor.numel() * tensor.element_size()
        kind = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)

    def pieces() -> Iterator[memoryview]:
        yield memoryview(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            view: memoryview = flat.numpy().data
            for at in range(0, len(view), _PIECE):
                yield view[at : at + _PIECE]

    return 8 + len(raw) + position, pieces()
