"""`llmq eval` and `llmq compare`: their options, and what they print. app.py adds them to its own commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llmq import ranks
from llmq.cli.launch import enter
from llmq.cli.options import Trust, err_console, explained
from llmq.errors import LlmqError
from llmq.grids.cache import CACHES, Cache

if TYPE_CHECKING:
    from llmq.report.report import Report

FORMATS = ("table", "markdown", "csv")
out_console = Console()

Where = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder for results and the finished parts of interrupted runs. Default: ~/.cache/llmq/eval."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Read texts and documents from this folder, not from the hub: wikitext2.txt, hellaswag_validation.jsonl …"
    ),
]


def add(app: typer.Typer) -> None:
    """Add both commands to the command line."""
    app.command("eval")(evaluate)
    app.command("compare")(compare)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or 'demo': quantized or not.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model to compare with; it is evaluated too. Default: the one in report.json."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Separated by commas: perplexity, divergence (from the base), speed, memory, and lm-eval's: "
            "hellaswag, piqa, arc_easy, mmlu … 'perplexity:c4' measures on that text. Default: perplexity.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(help="'demo' (held-out standard library), wikitext2, c4, ptb or a text file.")
    ] = "demo",
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. Default 2048, or the model's maximum.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first windows of the text.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    special_tokens: Annotated[
        bool, typer.Option(help="Whether the tokenizer adds its special tokens (a BOS) to the text.")
    ] = True,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Only the first documents of each task; below 1, that share of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's own.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="lm-eval requests per forward pass, or 'auto': as many as fit the GPU.")
    ] = "1",
    data_dir: DataDir = None,
    write_tasks: Annotated[
        Path | None,
        typer.Option(help="Write the task files for --data-dir here: `lm_eval --include_path` takes the same ones."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Measurements of a speed; from 6 on, an interval is reported.")
    ] = 7,
    out: Where = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (the model's own).")] = "float32",
    device: Annotated[
        str,
        typer.Option(help="Where models run: cpu, cuda, cuda:1 …, or auto: all GPUs first, then memory and disk."),
    ] = "cpu",
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="Run quantized weights packed, on llmq's operators, not as stock transformers runs them."
        ),
    ] = False,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            help=f"Round keys and values of the models, not of the base, as a server with such a cache would: "
            f"{', '.join(CACHES)}. With the folder's own scales, or else with those of each window.",
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            "--ranks",
            min=1,
            help="Share windows and requests among this many processes on this machine, each with its own copy of "
            "the model (--device cuda: on its own GPU); on several, start the command by torchrun. The numbers are "
            "those of one process with as many threads.",
        ),
    ] = 1,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity, divergence from the base, tasks, speed and memory: each number with its protocol and 95 % interval.

    The base model is measured in the same run. An interrupted run resumes; earlier measurements are not repeated. `llmq
    compare` shows models side by side.
    """
    with explained():
        enter(count)
        from llmq.report import terminal
        from llmq_eval import pages, processes, tables
        from llmq_eval.comparison import comparison
        from llmq_eval.evaluation import evaluate as run
        from llmq_eval.options import Options
        from llmq_eval.subject import default_out
        from llmq_eval.tasks import Settings

        processes.connect(device)
        models = [str(Path(name).expanduser()) if name.startswith("~") else name for name in models]
        with ranks.failing_together():
            reports = _reports(models)
            base = base or _base(reports, trust_remote_code)
            options = Options(
                tasks=_names(tasks),
                text=text,
                window=window,
                max_windows=max_windows,
                batch=batch,
                dtype=dtype,
                device=device,
                special_tokens=special_tokens,
                settings=Settings(_limit(limit), num_fewshot, _batch_size(batch_size)),
                data_dir=_folder(data_dir),
                write_tasks=write_tasks,
                out=out or default_out(),
                repeats=repeats,
                kernels=kernels,
                cache=None if kv_cache is None else Cache.named(kv_cache),
                trust_remote_code=trust_remote_code,
                fresh=fresh,
            )
        # A hub may have answered one rank, and another not.
        base = ranks.tell(base)
        if not kernels and reports and {"speed", "memory"} & set(options.tasks):
            _note("speed and memory are those of stock transformers; --kernels measures llmq's own operators")
        results = run(models, base, options, _note)
        if not ranks.first():
            ranks.stop()
            return
        tables.terminal(out_console, comparison(results), plain=True)
        for one in results:
            err_console.print(f"[dim]results: {escape(str(one.path(options.out)))}[/]", soft_wrap=True, highlight=False)
        for told in pages.tell_folders(results, options.out, _note):
            err_console.print(f"[dim]numbers added: {escape(str(told))}[/]", soft_wrap=True, highlight=False)
        for report in reports.values():
            terminal.headline(out_console, report)
        ranks.stop()


def compare(
    results: Annotated[
        list[str], typer.Argument(help="Models that were evaluated, results files, or folders of them (an --out).")
    ],
    format: Annotated[str, typer.Option(help=f"What to print: {', '.join(FORMATS)}.")] = "table",
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Every tested difference between two models, not only the ranks.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with the table and the plots here, as one file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The --out of `llmq eval`. Default: ~/.cache/llmq/eval.")
    ] = None,
) -> None:
    """Evaluated models side by side: recovery in % of the base, and which differences are significant.

    Differences are tested in pairs, over the same windows or documents; one that is not significant is shown as noise.
    """
    with explained():
        from llmq_eval import pages, store, tables
        from llmq_eval.comparison import comparison
        from llmq_eval.subject import default_out

        _check_format(format)
        found = comparison(store.collect(results, out or default_out(), _note))
        if html is not None:
            pages.write(html, found)
            err_console.print(f"[dim]page: {escape(str(html))}[/]", soft_wrap=True, highlight=False)
        if format == "table":
            tables.terminal(out_console, found, pairs)
        else:
            print(
                tables.markdown(found, pairs) if format == "markdown" else tables.comma_separated(found, pairs), end=""
            )


def _names(tasks: list[str] | None) -> tuple[str, ...]:
    names = tuple(name.strip() for given in tasks or ["perplexity"] for name in given.split(",") if name.strip())
    if not names:
        raise LlmqError("--tasks is empty: choose from perplexity, divergence, speed, memory, or tasks of lm-eval")
    return names


def _reports(models: list[str]) -> dict[str, Report]:
    """Those of the folders that llmq wrote. Raises LlmqError if one is not measured by text."""
    from llmq.report.report import Report

    reports = {name: Report.load(Path(name)) for name in models if Report.there(Path(name))}
    for name, report in reports.items():
        if report.recipe.get("model_class"):
            raise LlmqError(
                f"{name} was quantized as {report.recipe['model_class']} (--class), and llmq eval measures models "
                "that generate text only: llmq.load opens it, to measure its outputs with your own data"
            )
    return reports


def _note(told: str) -> None:
    if ranks.first():
        err_console.print(escape(told), style="dim", soft_wrap=True)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise LlmqError(f"--format must be one of {', '.join(FORMATS)}, not {format!r}")


def _limit(limit: float | None) -> float | None:
    if limit is not None and not (limit > 0 and math.isfinite(limit)):
        raise LlmqError(f"--limit must be a number of documents, or a share of them below 1, not {limit:g}")
    return int(limit) if limit is not None and limit >= 1 else limit


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isascii() and text.isdigit() and int(text)):
        raise LlmqError(f"--batch-size must be a whole number or 'auto', not {text!r}")
    return text if text == "auto" else int(text)


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.expanduser().is_dir():
        raise LlmqError(f"--data-dir {path}: no such folder")
    return path if path is None else path.expanduser()


def _base(reports: Mapping[str, Report], trust_remote_code: bool) -> str | None:
    """The base model that the folders' reports name; None, with a warning, if it is no longer available.

    Raises LlmqError if they name different ones: a model would be compared with a base that is not its own.
    """
    from llmq.checkpoint.hub import resolve

    named = {report.model: report.model for report in reports.values()}
    for model in named:
        # Two spellings may name the same folder.
        if Path(model).is_dir():
            named[model] = str(Path(model).resolve())
    if len(set(named.values())) > 1:
        told = "; ".join(f"{folder}: {report.model}" for folder, report in reports.items())
        raise LlmqError(f"these folders have different bases ({told}): evaluate them separately, or give --base")
    base = next(iter(named), None)
    if base is None:
        return None
    try:
        resolve(base, trust_remote_code=trust_remote_code)
    except LlmqError as error:
        text = f"{error}; it is the base model in report.json: measuring without it, unless you give --base"
        if ranks.first():
            err_console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
        return None
    return base
