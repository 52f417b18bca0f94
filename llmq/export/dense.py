"""The dense model that a quantized folder stands for, as plain safetensors for any tool: "simulated quantization"."""

from __future__ import annotations

from pathlib import Path

from llmq.checkpoint import hub
from llmq.checkpoint.claim import refuse_foreign
from llmq.checkpoint.files import CARD
from llmq.checkpoint.sink import Sink
from llmq.checkpoint.source import FolderSource, Source, check_finite
from llmq.errors import LlmqError
from llmq.formats.bitsandbytes.source import NF4Source, is_nf4
from llmq.formats.compressed_tensors import values
from llmq.formats.dequantized import Dequantized, dtype_of, open_source, reads
from llmq.formats.inspection import section_of
from llmq.formats.stacks import unmarked
from llmq.planning.memory import check_writable
from llmq.report.report import versions
from llmq.watch import Silent, Watch

UNIT_BYTES = 2**28


def export_dense(folder: str, out: str | Path, *, trust_remote_code: bool = False, watch: Watch | None = None) -> None:
    """Write the dense model that a quantized folder (or hub id) stands for to `out`, in the dtype of its config.json.

    One tensor is dequantized at a time, and a shard of up to 256 MiB is in memory; a killed run resumes. Rounding of
    inputs is not part of it. Raises LlmqError for a folder that is not quantized, or in a way that llmq does not write.
    """
    out, watch = Path(out), watch or Silent()
    check_writable(out)
    refuse_foreign(out)
    source = open_dense(hub.resolve(folder, trust_remote_code=trust_remote_code), trust_remote_code)
    told = f"The values of {folder}, dequantized by `llmq export --to dense`, in the full size."
    write_plain(source, out, watch, "Exporting", {CARD: f"# {out.absolute().name}\n\n{told}\n"})


def open_dense(folder: Path, trust_remote_code: bool = False) -> Source:
    """A quantized folder whose weights are dequantized when they are read. Raises LlmqError as `export_dense` does."""
    base = FolderSource(folder, trust_remote_code, quantized_ok=True)
    method, section = section_of(folder, base.config)
    if method is None:
        raise LlmqError(f"{folder} is not quantized: there is nothing to export, it is the dense model")
    if unmarked(section)[1] and not reads(folder, base.config):
        raise LlmqError(
            f"{folder} has experts packed one by one where its model has one tensor for all, which no other tool "
            "reads: llmq.load runs it; to export, quantize without --loader llmq"
        )
    if reads(folder, base.config):
        return open_source(folder, trust_remote_code)
    if is_nf4(base.config):
        return NF4Source(folder, trust_remote_code)
    if method == "compressed-tensors":
        dtype = dtype_of(base.config)
        return Dequantized(base, method, values.coded(base, section, dtype), dtype)
    raise LlmqError(
        f"{folder} is quantized with {method}, which llmq does not make dense: export it with the tool that wrote it"
    )


def write_plain(
    source: Source, out: Path, watch: Watch, stage: str = "Merging", extra: dict[str, str | bytes] | None = None
) -> None:
    """A source in its own dtypes, in shards of up to 256 MiB; resumes. extra: more files. Raises LlmqError."""
    units: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        nbytes = source.info(name).nbytes
        if units[-1] and size + nbytes > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(name)
        size += nbytes
    fingerprint = {"source": source.fingerprint(), "recipe": "as it is", "versions": versions()}
    with Sink.open(out, fingerprint, units=len(units)) as sink:
        for note in sink.notes:
            watch.note(note)
        watch.stage(stage, len(units))
        for index, names in enumerate(units):
            if f"unit {index}" not in sink.done:
                tensors = {name: source.read(name) for name in names}
                for name, tensor in tensors.items():
                    check_finite(tensor, name, source.info(name).file)
                sink.commit(f"unit {index}", tensors, {})
            watch.step("")
        sink.finish(source.config, source.aux_files(), extra or {})
