"""`llmq export`: a finished folder in the formats of other programs. app.py adds it to its own commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llmq.cli.options import Trust, err_console, explained
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.export.gguf import Exported
    from llmq.export.rewrite import Rewritten

TARGETS = ("gguf", "mlx", "gptq", "awq", "dense")
GGUF = "GGUF"
out_console = Console()


def export(
    folder: Annotated[str, typer.Argument(help="A folder that llmq quantize wrote, or a hub id of one.")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf: a file for llama.cpp, Ollama, LM Studio; mlx: a folder for Macs (mlx-lm, LM Studio); gptq, "
            "awq: folders for older runtimes; dense: the dequantized weights as plain safetensors, in the model's "
            "dtype and full size."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file (gguf) or folder to write.")],
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            help="A clone of llama.cpp, or the source of llama-cpp-python: its converter is run. Default: "
            "$LLMQ_LLAMA_CPP, or convert_hf_to_gguf.py on the path.",
            rich_help_panel=GGUF,
        ),
    ] = None,
    embedding: Annotated[
        str,
        typer.Option(
            help="Input and output embedding, if they are not quantized: keep (default: in the model's dtype) or q8_0.",
            rich_help_panel=GGUF,
        ),
    ] = "keep",
    prefer: Annotated[
        str | None,
        typer.Option(
            help="A type to take wherever it holds the codes, as q8_0 for 4-bit ones. Default: the smallest that does.",
            rich_help_panel=GGUF,
        ),
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp's name for how the tokenizer splits text, if its converter does not know the tokenizer.",
            rich_help_panel=GGUF,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Where temporary files go: twice the size of the unquantized model. Default: beside the output.",
            rich_help_panel=GGUF,
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a quantized folder in another program's format: the same codes and scales, nothing is quantized again.

    [bold]--to dense[/] is also called simulated quantization: any tool computes with the quantized values. If that run
    is killed, the same command resumes it.
    """
    with explained():
        if to not in TARGETS:
            raise LlmqError(f"--to {to}: choose from {', '.join(TARGETS)}")
        from llmq.checkpoint.hub import resolve

        path = resolve(folder, trust_remote_code=trust_remote_code)
        if to != "gguf":
            given = {"--llama-cpp": llama_cpp, "--prefer": prefer, "--pre-tokenizer": pre_tokenizer, "--work": work}
            alone = [name for name, value in given.items() if value is not None]
            alone += ["--embedding"] if embedding != "keep" else []
            if alone:
                raise LlmqError(f"{', '.join(alone)}: only for --to gguf")
            if to == "dense":
                _dense(folder, out, trust_remote_code)
                return
            from llmq.export.rewrite import rewrite

            _show_folder(rewrite(path, out, to, trust_remote_code))
            return
        from llmq.export.gguf import export_gguf

        done = export_gguf(
            path,
            out,
            llama_cpp=llama_cpp,
            embedding=embedding,
            prefer=prefer,
            pre_tokenizer=pre_tokenizer,
            work=work,
            trust_remote_code=trust_remote_code,
        )
        _show(done)


def _dense(folder: str, out: Path, trust_remote_code: bool) -> None:
    from llmq.export.dense import export_dense
    from llmq.report.progress import Bars

    with Bars(err_console) as bars:
        export_dense(folder, out, trust_remote_code=trust_remote_code, watch=bars)
    out_console.print(f"written: {escape(str(out))}", highlight=False, soft_wrap=True)


def _show_folder(done: Rewritten) -> None:
    """What was written, and what of it is not as in the folder."""
    exact = "every number as in the folder"
    worst = f"differs by at most {done.worst:.1g} of the largest number" if done.worst else exact
    lines = [f"{count:5} weights with {scheme}" for scheme, count in done.schemes.items()]
    lines += [f"{len(done.dense):5} not quantized in the folder: {', '.join(done.dense)}"] if done.dense else []
    lines.append(f"{done.path}: {done.nbytes / 2**20:.1f} MiB, read back and compared: {worst}")
    for line in lines:
        out_console.print(escape(line), highlight=False, soft_wrap=True)
    for warning in done.warnings:
        out_console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _show(done: Exported) -> None:
    """What was written of which tensors, and what of it is not as in the folder."""

    def say(text: str) -> None:
        out_console.print(escape(text), highlight=False, soft_wrap=True)

    for kind, why in dict.fromkeys((row.kind, row.why) for row in done.rows):
        rows = [row for row in done.rows if (row.kind, row.why) == (kind, why)]
        quantized = any(row.bits is not None for row in rows)
        worst = max(row.worst for row in rows)
        exact = "every number as in the folder" if worst == 0 else f"differs by at most {worst:.1g} of the largest"
        size = sum(row.nbytes for row in rows) / 2**20
        named = f"{why}: {', '.join(row.name for row in rows)}" if why else "as they were"
        say(f"{kind:6} {len(rows):5} tensors {size:9.1f} MiB  {exact if quantized else named}")
    for warning in done.warnings:
        out_console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    say(f"{done.path}: {done.nbytes / 2**20:.1f} MiB, read back and compared with the dequantized weights")
