"""The command-line options that make a recipe: a few of its own, and the keyword arguments of every method.

A method's options are read from its source (`llmq.recipe.catalog`), so that `--help` needs no torch and methods of
other packages have their options here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from llmq import ranks
from llmq.errors import LlmqError
from llmq.grids.cache import CACHES
from llmq.grids.table import GRIDS
from llmq.machine import parse_size
from llmq.recipe import catalog, presets
from llmq.recipe.recipe import Recipe, parse_override

err_console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A folder (config.json, safetensors), a hub id (org/name), or 'demo'.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write. The same command resumes a broken run.")]
Tp = Annotated[int, typer.Option(min=1, help="Refuse shapes that tensor parallelism over this many GPUs cannot split.")]
Device = Annotated[str, typer.Option(help="Where a block is computed: cpu, cuda, cuda:1 …")]
Ranks = Annotated[
    int,
    typer.Option(
        "--ranks",
        min=1,
        help="Quantize by this many processes on this machine; on several, start the command by torchrun. The bytes "
        "are those of one process with as many threads.",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="The most memory that a process may take, such as 9GiB; by default what is free. Where a run would take "
        "more, hidden states are put into files in OUT, and statistics are collected in several passes. That takes "
        "longer; the bytes are the same.",
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code. Read it first.")]
StreamHub = Annotated[
    bool,
    typer.Option(
        "--stream-hub",
        help="Read a hub model's weights over the network as they are needed, and never write them to a disk.",
    ),
]

Method = Annotated[
    str | None,
    typer.Option(
        help="What to do, joined by '+': transforms, a quantizer, refinements, and last what tunes the whole model. "
        "`llmq methods` lists them."
    ),
]
Bits = Annotated[int | None, typer.Option(help="Bits per weight, 2 to 8. Default 4, or the method's own.")]
Group = Annotated[
    str | None, typer.Option("--group-size", help="Inputs that share a scale, or 'channel'. Default 128.")
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Without or with zero points. Default symmetric: stock transformers fails to load packed zero points.",
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(help=f"Which values weights are rounded to: {', '.join(GRIDS)}. Default int, or the method's own."),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="Round the inputs of weights as well, to 8 bits, or to 4 beside FP4: dynamic (per token, or per group), "
        "static (per tensor; nvfp4), fp8 (beside 4-bit grid int or mxfp4) or none."
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        help="free (default); pow2: scales of grid int are powers of two, also those of inputs where they are static, "
        "so that a product with one is a shift; float16: they are what float16 holds, as GGUF stores them."
    ),
]
LevelRows = Annotated[
    int | None,
    typer.Option(
        help="Of grid kmeans: rows that share levels (default 1: each has its own); from 2 on, each row has a scale. "
        "Levels take fewer bits so, which counts in small matrices."
    ),
]
Packing = Annotated[
    str | None,
    typer.Option(
        help="Of grids ternary and binary: standard (default) stores 2 bits, as stock transformers reads them; "
        "llmq stores 1.6 bits (five codes in a byte) and 1 bit, in a folder that only llmq reads; of vq: llmq stores "
        "experts, too, and several widths in one folder."
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        help="Calibration text: 'demo', a .txt, .json, .jsonl, .csv or .parquet file, or a hub data set id (org/name, "
        "org/name:config).",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        help="The column of the calibration rows. Default: the one with chats, 'text', a prompt and its answer, or the "
        "only text."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. Default 128.")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens per window. Default 2048, or the model's maximum.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="A preset (`llmq recipes` lists them) or a YAML file; options given beside it win."),
]
Override = Annotated[
    list[str] | None, typer.Option(help="'PATTERN=bits:8,group_size:64' for matching weights. Repeatable.")
]
Keep = Annotated[list[str] | None, typer.Option(help="Leave the weights that match this pattern alone. Repeatable.")]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Quantize linear weights outside the decoder's blocks that match this pattern, too ('visual.*', 'mtp.*', "
        "lm_head): without calibration, by rtn if the method needs it. Repeatable."
    ),
]
ModelClass = Annotated[
    str | None,
    typer.Option(
        "--class",
        help="For models that do not generate text, or have an encoder (BERT, T5, Whisper, CLIP …): the class of "
        "transformers that opens the model, such as AutoModel or AutoModelForSeq2SeqLM. All its linear weights are "
        "quantized without calibration: --method rtn or hqq.",
    ),
]
Ragged = Annotated[
    str | None,
    typer.Option(help="If the group size does not divide a width: error (default), smaller, channel or keep."),
]
Loader = Annotated[
    str | None,
    typer.Option(
        help="Who is to load the folder: any (default: refuse different schemes where servers such as vLLM make one "
        "matrix of several weights), transformers, vllm (also packs experts in nvfp4, mxfp8 and fp8-block, which stock "
        "transformers would read wrong: it refuses such a folder), or llmq (also packs experts that the checkpoint "
        "stores as one tensor for all, which other loaders cannot read: they refuse such a folder)."
    ),
]
Route = Annotated[
    str | None,
    typer.Option(
        help="The tokens that each expert of a mixture is calibrated with: own (default: those that chose it; a rare "
        "one borrows statistics of others) or all. All can help where most experts have fewer than about 50 tokens; "
        "experts with hundreds get worse by it, and every expert runs on every token."
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        help=f"Round the keys and values that a server keeps of its tokens: {', '.join(CACHES)}. Their scales are "
        "calibrated and stored; vLLM keeps fp8 in half the memory, stock transformers only computes with rounded ones.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random. Default 0.")]


@contextmanager
def explained() -> Iterator[None]:
    """Turn an LlmqError into its message and exit code 2, and Ctrl-C into exit code 130.

    Of several ranks the one that failed says so, and rank 0 what all failed by.
    """
    try:
        yield
    except LlmqError as error:
        common, lost = isinstance(error, ranks.Common), isinstance(error, ranks.Lost)
        if ranks.first() if common else not (lost and ranks.launched()):
            who = "" if ranks.size() == 1 or common or lost else f"{ranks.name()}: "
            err_console.print(f"[bold red]error:[/] {escape(who + str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if ranks.first():
            err_console.print("interrupted")
        raise typer.Exit(130) from None


def recipe_options(
    method: Method = None,
    bits: Bits = None,
    group_size: Group = None,
    symmetric: Symmetric = None,
    grid: Grid = None,
    activations: Activations = None,
    scales: Scales = None,
    packing: Packing = None,
    level_rows: LevelRows = None,
    calib: Calib = None,
    column: Column = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    recipe: RecipeName = None,
    override: Override = None,
    keep: Keep = None,
    include: Include = None,
    ragged: Ragged = None,
    loader: Loader = None,
    route: Route = None,
    model_class: ModelClass = None,
    kv_cache: KvCache = None,
    seed: Seed = None,
    **options: Any,
) -> Recipe:
    """The preset or file, or the defaults, changed by the options that were given. Raises LlmqError."""
    given: dict[str, Any] = {
        "methods": method,
        "keep": keep or None,
        "include": include or None,
        "ragged": ragged,
        "loader": loader,
    }
    given |= {"route": route, "model_class": model_class, "kv_cache": kv_cache, "seed": seed}
    scheme = {
        "bits": bits,
        "group_size": None if group_size is None else parse_group(group_size),
        "symmetric": symmetric,
        "grid": grid,
        "activations": activations,
        "scales": scales,
        "packing": packing,
        "level_rows": level_rows,
    }
    calibration = {"text": calib, "column": column, "samples": samples, "seqlen": seqlen}
    data = presets.read(recipe) if recipe else {}
    # The whole recipe is checked below; here only the sections that options write to must be mappings.
    for name in ("scheme", "calibration", "options"):
        if not isinstance(data.get(name, {}), dict):
            raise LlmqError(f"{recipe}: {name} must be a mapping, not {data[name]!r}")
    parts: list[tuple[str | None, dict[str, Any]]] = [
        (None, given),
        ("scheme", scheme),
        ("calibration", calibration),
        ("options", options),
    ]
    for part, changes in parts:
        within = data if part is None else data.setdefault(part, {})
        within |= {key: value for key, value in changes.items() if value is not None}
    made = Recipe.from_dict(data, recipe or "recipe")
    changed = tuple(parse_override(text, made.scheme) for text in override or ())
    return replace(made, overrides=(*made.overrides, *changed))


def method_options() -> list[Parameter]:
    """Every option of every method, once each, as parameters of a command."""
    found: dict[str, tuple[catalog.Option, list[str]]] = {}
    for method in catalog.known()[0]:
        for option in method.options:
            found.setdefault(option.name, (option, []))[1].append(method.name)
    parameters = []
    for name, (option, owners) in sorted(found.items()):
        text = f"({', '.join(owners)}) {option.help}"
        flag = f"--{name.replace('_', '-')}"
        flags = [flag, f"--no-{flag[2:]}"] if option.kind is bool else [flag]
        made = typer.Option("/".join(flags), help=text, rich_help_panel="Options of methods")
        kind: Any = Annotated[option.kind | None, made]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    return parameters


def parse_memory(text: str | None) -> int | None:
    """'9GiB' → bytes; None stays. Raises LlmqError."""
    return None if text is None else parse_size(text, "--max-memory")


def parse_group(text: str) -> int | str:
    """'128' → 128; 'channel' stays. Raises LlmqError."""
    if text != "channel" and not text.isdigit():
        raise LlmqError(f"--group-size must be a whole number or 'channel', not {text!r}")
    return text if text == "channel" else int(text)


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Add a recipe's options to a command, which gets the resulting Recipe."""
    own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "chosen"]
    fixed = [p for p in signature(recipe_options, eval_str=True).parameters.values() if p.name != "options"]
    taken = {p.name for p in (*own, *fixed)}
    # An option of another package's method may have a name that is taken here: it can still be set in a recipe file.
    options = [*fixed, *(p for p in method_options() if p.name not in taken)]

    @wraps(command)
    def wrapped(**given: Any) -> None:
        with explained():
            chosen = recipe_options(**{p.name: given.pop(p.name) for p in options})
            command(chosen=chosen, **given)

    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *options)]
    wrapped.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
