"""One whole job: from a model's name to a finished folder and its report."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import formats, methods, ranks
from llmq.allocation import allocate, chunks
from llmq.allocation.goal import Goal
from llmq.allocation.windows import extra
from llmq.checkpoint import hub
from llmq.checkpoint.claim import refuse_foreign
from llmq.checkpoint.files import CARD, RECIPE, REPORT
from llmq.checkpoint.follower import open_sink
from llmq.checkpoint.remote import open_remote
from llmq.checkpoint.source import Source
from llmq.checkpoint.strangers import of_tokenizer
from llmq.data.calibration import Windows, windows
from llmq.discovery.architecture import in_towers
from llmq.discovery.reasons import Kind
from llmq.errors import LlmqError
from llmq.formats.dequantized import open_source
from llmq.formats.served import guarded
from llmq.formats.stacks import marked
from llmq.grids.scheme import Scheme
from llmq.machine import check_device
from llmq.planning.cache import check_stock
from llmq.planning.checks import check_ranks
from llmq.planning.memory import check_room, check_writable
from llmq.planning.named_class import check_named_class
from llmq.planning.outside import head_of, loads_dense
from llmq.planning.plan import Plan, make_plan
from llmq.planning.targets import targets
from llmq.planning.weights import WeightPlan
from llmq.recipe import catalog
from llmq.recipe.recipe import Calibration, Recipe
from llmq.report import card
from llmq.report.page import PAGE, report_page
from llmq.report.report import Report, make_report, versions
from llmq.spill import saving
from llmq.streaming import stream
from llmq.streaming.block_io import rest
from llmq.watch import Silent, Watch


def plan(
    model: str,
    recipe: Recipe | None = None,
    *,
    goal: Goal | None = None,
    out: str | Path | None = None,
    tp: int = 1,
    device: str = "cpu",
    ids: Tensor | None = None,
    trust_remote_code: bool = False,
    stream_hub: bool = False,
    max_memory: int | None = None,
    watch: Watch | None = None,
) -> Plan:
    """Check and size everything that `quantize` would do, without doing it. Raises LlmqError if `quantize` would.

    goal: the budget that bits will be chosen for; the plan is then that of the recipe's own scheme, which only counts
    for what the budget leaves alone. ids: calibration windows [samples, tokens] of token ids in place of the recipe's
    text. max_memory: the most bytes of memory that a process may take, by default what the machine has: where what is
    planned first takes more, activations are put into files, and statistics are collected in passes.
    """
    with ranks.failing_together():
        made = _made(
            model, recipe, out, tp, device, ids, trust_remote_code, stream_hub, max_memory, scored=goal is not None
        )
        check_ranks(chosen=goal is None)
    if goal is not None:
        allocate.prepare(made, goal, watch)
        chunks.files(made, goal.fit)
        check_room(made.budget, None, device, max_memory, scoring=True)
    return made


def _made(
    model: str,
    recipe: Recipe | None,
    out: str | Path | None,
    tp: int,
    device: str,
    ids: Tensor | None,
    trust_remote_code: bool,
    stream_hub: bool,
    max_memory: int | None,
    *,
    held: bool = False,
    scored: bool = False,
) -> Plan:
    """A plan. held: whether some windows of the text are kept back; scored: whether windows are needed in any case, of
    which some are kept back."""
    recipe = recipe or Recipe()
    device = ranks.own_device(device)
    check_device(device)
    methods.make(recipe)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_writable(folder)
        refuse_foreign(folder)
    if stream_hub:
        found, store = open_remote(model, trust_remote_code=trust_remote_code)
        source = open_source(found, trust_remote_code, store)
    else:
        source = open_source(hub.resolve(model, trust_remote_code=trust_remote_code), trust_remote_code)

    def wanted(longest: int | None) -> Windows:
        more = extra(min(recipe.calibration.seqlen, longest or recipe.calibration.seqlen)) if held or scored else 0
        if ids is not None:
            found = Windows(ids, (), f"{ids.shape[0]} windows of {ids.shape[1]} tokens given by the caller")
            more = extra(ids.shape[1]) if more else 0
        else:
            asked = replace(recipe.calibration, samples=recipe.calibration.samples + more)
            found = calibration_windows(source, asked, recipe.seed, longest)
        return found.apart(more) if more else found

    made = make_plan(source, recipe, wanted, out=folder, tp=tp, device=device, scored=scored, limit=max_memory)
    # Refused now, not after the work: what the format's config cannot express, or a loader would not take.
    section = config(made)["quantization_config"]
    if made.cache is not None and not made.served:
        models = [made.model, *([] if made.named is None else [made.named.model])]
        made.cache = check_stock(made.cache, made.recipe, models, section)
    check_named_class(made, section)
    return made


def quantize(
    model: str,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    goal: Goal | None = None,
    tp: int = 1,
    device: str = "cpu",
    ids: Tensor | None = None,
    trust_remote_code: bool = False,
    stream_hub: bool = False,
    max_memory: int | None = None,
    watch: Watch | None = None,
    made: Plan | None = None,
    command: str | None = None,
) -> Report:
    """Quantize a model folder, hub id or 'demo' into the folder `out`, and verify it.

    If the run is killed, the same call resumes it. `goal`: the budget that each weight's bits are chosen for; what it
    led to is written as `recipe.yaml`. `made`: a plan of the same arguments, if there is one already;
    `command`: the command that the report gives for repeating the run, if that is not `llmq quantize`.
    Raises LlmqError; finished blocks are kept.
    """
    began = time.perf_counter()
    out = Path(out)
    watch = watch or Silent()
    made = made or plan(
        model,
        recipe,
        goal=goal,
        out=out,
        tp=tp,
        device=device,
        ids=ids,
        trust_remote_code=trust_remote_code,
        stream_hub=stream_hub,
        max_memory=max_memory,
        watch=watch,
    )
    where = torch.device(ranks.own_device(device))
    chosen = None if goal is None else allocate.choose_bits(made, goal, where, watch)
    if chosen is not None:
        made = _made(model, chosen.recipe, out, tp, device, ids, trust_remote_code, stream_hub, max_memory, held=True)
    told = fingerprint(made, device)
    ranks.agree(told | {"threads": torch.get_num_threads(), "command": str(out.absolute())}, "run")
    with open_sink(out, told, units=len(rest(made)) + sum(len(block.units) for block in made.blocks)) as sink:
        for note in sink.notes:
            watch.note(note)
        if sink.finished:
            watch.note(f"{out} is finished already: this is its report")
            return Report.load(out)
        # Ranks have to collect statistics in the same passes.
        with saving(max(ranks.everyone(made.saving)), sink.state_of("")):
            stream.run(made, sink, where, watch)
        described = config(made)
        # On all ranks: what it asks of other libraries, they may tell each other.
        check_named_class(made, described["quantization_config"], sink)
        if not ranks.first():
            sink.finish({}, {}, {})
            return Report.load(out)
        # A local model is recorded by its absolute path, so that the report can be used from any working directory.
        name = str(Path(model).absolute()) if Path(model).exists() else model
        if command is None:
            command = "" if ids is not None else repeat(model, out, device, tp, trust_remote_code, stream_hub)
        report = make_report(made, name, out, sink.done, time.perf_counter() - began, sink.total_bytes, command)
        if chosen is not None:
            report.chosen = allocate.measured(chosen, made, sink, where, watch)
        files = {
            **({} if chosen is None else {RECIPE: chosen.recipe.to_yaml(), **chunks.files(made, chosen.goal.fit)}),
            REPORT: report.to_json(),
            PAGE: report_page(report),
            CARD: card.model_card(report, made.source.folder),
        }
        sink.finish(described, made.source.aux_files(), files)
    return report


def repeat(model: str, out: Path, device: str, tp: int, trust_remote_code: bool, stream_hub: bool) -> str:
    """The command line that runs the same job, with its recipe in a file `recipe.yaml`."""
    words = ["llmq", "quantize", model, "-o", str(out), "--recipe", "recipe.yaml"]
    words += ["--device", device] if device != "cpu" else []
    words += ["--tp", str(tp)] if tp != 1 else []
    words += ["--trust-remote-code"] if trust_remote_code else []
    return shlex.join([*words, *(["--stream-hub"] if stream_hub else [])])


def config(made: Plan) -> dict[str, Any]:
    """The source's config with the quantization section, which names modules as the model, the checkpoint and the
    class that config.json names do.

    Every matrix that is not quantized is listed as left alone, also those that transformers does not load: a server
    may, and would take it for a quantized one. Beside a tower that is left alone, quantized modules are targets by
    name: a server may have names for the tower's layers that nobody else has, so that no list has them.
    """
    groups: dict[Scheme, list[str]] = {}
    ignore: list[str] = []
    linears = {n for n, m in made.model.named_modules() if isinstance(m, torch.nn.Linear)}
    unused = set(made.links.unused)
    other = {} if made.named is None else made.named.parameters

    def names_of(item: WeightPlan) -> list[str]:
        return [item.module, item.name, other.get(item.tensor, item.tensor).removesuffix(".weight")]

    for item in made.weights:
        names = names_of(item)
        if item.scheme is not None:
            groups.setdefault(item.scheme, []).extend(dict.fromkeys(names))
        elif item.module in linears or (item.tensor in unused and item.tensor.endswith(".weight")):
            ignore.extend(names)
        elif item.reason is not None and item.reason.kind is Kind.ROUTER:
            # No linear module in transformers; in vLLM it is one.
            ignore.extend(names)
        elif item.tensor in made.links.slices:
            # A stack of experts that is left alone; vLLM asks for its parts.
            ignore.extend(name.removesuffix(".weight") for name in made.links.tensors(item.tensor))
        linears.discard(item.module)
    experts = {item.scheme for item in made.weights if item.expert is not None}
    order = sorted(groups, key=lambda s: (s not in experts, -len(groups[s]), str(s)))
    groups = {scheme: groups[scheme] for scheme in order}
    heads = {name.removesuffix(".weight") for name in head_of(made.model)}
    if made.named is not None:
        # Of the class in config.json, a tied output embedding is no tensor of the checkpoint.
        known = {*ignore}.union(*groups.values())
        last = getattr(made.named.model, "get_output_embeddings", lambda: None)()
        linears |= {name for name, module in made.named.model.named_modules() if module is last} - known
    section = formats.config(groups, [*ignore, *sorted(linears)], made.dtype)
    head = [name for item in made.outside.values() if item.module in heads for name in names_of(item)]
    towers = {*in_towers(made.model if made.named is None else made.named.model)}.difference(*groups.values())
    if towers:
        chosen = [(item, names_of(item)) for item in made.weights if item.scheme is not None]
        inside = {name for item, names in chosen if item.block is not None for name in names}
        beside = {name for item in made.weights if towers & {*names_of(item)} for name in names_of(item)}
        loaded = {item.module for item, _ in chosen} if made.named is None else set()
        named = inside if inside <= loaded else targets(inside, towers | beside)
        rest = {name for item, names in chosen if item.block is None for name in names}
        section = formats.with_targets(section, made.schemes, {*named, *rest}, classes=False)
    elif head:
        section = formats.with_targets(section, made.schemes, head)
    if made.stacked:
        section = marked(section)
    if made.served:
        section = guarded(section)
    if loads_dense(made.model, made.weights, made.dtype):
        section = formats.dense(section, made.schemes)
    if made.cache is not None:
        section = formats.with_cache(section, made.schemes, made.cache.cache)
    told: dict[str, Any] = {"quantization_config": section}
    if made.recipe.model_class is not None and not made.source.config.get("architectures"):
        # Else nothing in the folder says which class opens it.
        told |= {"architectures": [type(made.model).__name__]}
    return made.source.config | told


def fingerprint(made: Plan, device: str) -> dict[str, Any]:
    """What must be unchanged to resume a run in a folder: model, recipe, calibration text, versions, device."""
    return {
        "source": made.source.fingerprint(),
        # No byte depends on which loader is asked for: the schemes say what it allows.
        "recipe": {key: value for key, value in made.recipe.to_dict().items() if key != "loader"},
        "calibration": made.calibration.digest,
        "versions": versions() | catalog.versions(made.recipe.methods),
        "device": torch.device(device).type,
    }


def calibration_windows(source: Source, calibration: Calibration, seed: int, longest: int | None) -> Windows:
    """The calibration windows, by the model's own tokenizer, no longer than the model's maximum length."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        told = of_tokenizer(source.folder, error)
        raise LlmqError(f"{told} (--method rtn needs no calibration text, and no tokenizer)") from error
    if longest is not None:
        calibration = replace(calibration, seqlen=min(calibration.seqlen, longest))
    return windows(calibration, tokenizer, seed=seed)
