"""What is true of a checkpoint, found without llmq: by an ordinary forward pass with hooks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmq.discovery import blocks as discover
from llmq.discovery.calls import record
from llmq.planning.plan import Plan

MIXTURE = re.compile(r"experts|sparsemoe", re.IGNORECASE)


def stock(folder: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The checkpoint as a class of stock transformers loads it, in float32."""
    loaded: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


def logits(model: nn.Module, ids: Tensor, **beside: Tensor) -> Tensor:
    """The model's logits [batch, tokens, vocab]; 0 for tokens that it never gives. beside: what its forward wants with
    the token ids."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False, **beside).logits
    return result.masked_fill(result == torch.finfo(result.dtype).min, 0)


def apart(value: Tensor, target: Tensor) -> float:
    """‖value − target‖ / ‖target‖."""
    return float((value.double() - target.double()).norm() / target.double().norm().clamp_min(1e-30))


def depth(model: PreTrainedModel) -> int | None:
    """How many layers the configuration says the decoder has."""
    config = model.config.get_text_config(decoder=True)
    config = getattr(config, "global_config", config)
    # Where both are there, num_hidden_layers may count the attentions of a layer.
    for name in ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers", "n_layer", "n_layers"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


def is_mixture(model: nn.Module) -> bool:
    """Whether any module is named or made as a mixture of experts."""
    return any(
        MIXTURE.search(name.rpartition(".")[2]) or re.search("Experts?$|TopKRouter|SparseMoe", type(module).__name__)
        for name, module in model.named_modules()
        if name
    )


@dataclass
class Seen:
    """An ordinary forward pass: each block's output, and how often each Linear within the blocks was called."""

    outputs: list[Tensor] = field(default_factory=list)
    linears: dict[str, int] = field(default_factory=dict)


def watch(model: nn.Module, path: str, ids: Tensor) -> Seen:
    """Run the model with hooks on the blocks of the list at `path` and on their Linear modules."""
    seen = Seen()
    hooks = []
    seen_ids: dict[int, str] = {}
    for i, block in enumerate(model.get_submodule(path).children()):

        def note(_: nn.Module, __: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else next(o for o in output if isinstance(o, Tensor))
            seen.outputs.append(first.detach().clone())

        hooks.append(block.register_forward_hook(note))
        for name, module in block.named_modules():
            full = f"{path}.{i}.{name}"
            if isinstance(module, nn.Linear) and id(module) not in seen_ids:
                seen_ids[id(module)] = full

                def count(_: nn.Module, __: Any, ___: Any, full: str = full) -> None:
                    seen.linears[full] = seen.linears.get(full, 0) + 1

                hooks.append(module.register_forward_hook(count))
    try:
        logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def buffer_faults(built: nn.Module, real: nn.Module) -> list[str]:
    """Buffers that differ between the model that llmq builds and the one from_pretrained gives."""
    ours, theirs = dict(built.named_buffers()), dict(real.named_buffers())
    faults = [f"buffer {n} only in one of the two" for n in ours.keys() ^ theirs.keys()]
    stored = set(built.state_dict())
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if a.device.type == "meta" or a.shape != b.shape or not torch.equal(a.float(), b.float()):
            faults.append(f"buffer {name} differs" + (" (stored)" if name in stored else ""))
    return sorted(faults)


def faults(
    folder: Path, ids: Tensor, tolerance: float = 1e-5, kind: Any = AutoModelForCausalLM
) -> tuple[discover.Structure, list[str]]:
    """Everything in which discovery disagrees with an ordinary forward pass. Raises LlmqError where `find` refuses."""
    real = stock(folder, kind)
    model = discover.build(folder, torch.float32)
    structure = discover.find(model)
    found: list[str] = []
    if any(p.device.type != "meta" for p in model.parameters()):
        found.append("find left parameters in memory")
    if depth(real) != len(structure.blocks):
        found.append(f"{len(structure.blocks)} blocks found, the configuration says {depth(real)}")
    found += [f for f in buffer_faults(model, real) if "(stored)" not in f]
    seen = watch(real, structure.path, ids)
    found += _replay_faults(model, real, structure, seen, ids, tolerance)
    named = {w.name for b in structure.blocks for w in b.weights}
    reasons = {n: r for b in structure.blocks for n, r in b.left.items()}
    for name, calls in seen.linears.items():
        if name not in named and f"{name}.weight" not in reasons:
            found.append(f"{name} was called {calls} times and is not in the structure")
        if name in named and calls != 1:
            found.append(f"{name} is called {calls} times in a forward pass")
    found += [f"{name} is not a Linear that was called" for name in named - seen.linears.keys()]
    return structure, found


def _replay_faults(
    model: nn.Module, real: nn.Module, structure: discover.Structure, seen: Seen, ids: Tensor, tolerance: float
) -> list[str]:
    blocks = list(model.get_submodule(structure.path).children())
    fill(model, real)
    recording = record(model, blocks, [ids])
    if len(seen.outputs) != len(blocks):
        return [f"an ordinary forward pass calls the blocks {len(seen.outputs)} times"]
    (states,) = recording.states()
    with torch.inference_mode():
        for i, block in enumerate(blocks):
            (call,) = recording.of_block(i, [states])
            states = call.step(block, states.hidden, torch.device("cpu"))
            if not apart(states.hidden, seen.outputs[i]) <= tolerance:
                return [f"block {i} replayed is {apart(states.hidden, seen.outputs[i]):.1e} off"]
    return []


def fill(model: nn.Module, real: nn.Module) -> None:
    """Give a model on the meta device the parameters and stored buffers of a loaded one."""
    for name, parameter in real.named_parameters():
        discover.assign(model, name, parameter.detach().clone())
    persistent = set(real.state_dict())
    for name, buffer in real.named_buffers():
        if name in persistent:
            discover.assign(model, name, buffer.detach().clone())


class Stopped(Exception):
    """A run ended in an error after the plan had promised that it would not."""


@dataclass
class Quantized:
    """A checkpoint quantized, loaded again by stock transformers and compared.

    error: how far its logits are from those of llmq's weights in memory; moved: how far those are from the source's;
    share: quantized of all 2-D weights in the blocks; left: why the others were left; plan: what was to be done;
    corrected: how many weights were corrected for errors in their inputs, and how many also for their stream.
    """

    error: float
    moved: float
    share: str
    left: list[str]
    plan: Plan
    corrected: str


@dataclass
class Run:
    """A checkpoint quantized to 4 bits. kept: llmq's weights in memory, by parameter; experts: those of one expert."""

    plan: Any
    kept: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def give(self, reference: PreTrainedModel) -> set[str]:
        """Give a loaded source model these weights; returns the names of its parameters that have some.

        Its class may be a larger one than llmq's; the module that has the blocks is of one class in both.
        """
        inner = self.plan.structure.path.rpartition(".")[0]
        decoder = type(self.plan.model.get_submodule(inner))
        (outer,) = (name for name, module in reference.named_modules() if type(module) is decoder)
        names: set[str] = set()

        def of(name: str) -> str:
            full = ".".join(part for part in (outer, name.removeprefix(inner).strip(".")) if part)
            names.add(full)
            return full

        with torch.no_grad():
            for name, weight in self.kept.items():
                reference.get_parameter(of(name)).copy_(weight)
            for (stack, number), weight in self.experts.items():
                reference.get_parameter(of(stack))[number].copy_(weight)
        return names


def quantize(
    source: Path, out: Path, windows: Tensor, method: str = "gptq", loader: str = "any", **options: object
) -> Run:
    """Quantize to 4 bits, and keep llmq's weights.

    Raises LlmqError where the plan refuses, and Stopped where the run ends in an error all the same.
    """
    import llmq
    from llmq import job
    from llmq.streaming import mixture, stream

    original = stream.pack_weights

    def remember(plan: Any, block: Any, weights: Any = None) -> Any:
        if weights is None:
            for name in [*block.weights, *block.changed]:
                run.kept[f"{plan.name}.{name}"] = block.module.get_parameter(name).detach().clone()
            return original(plan, block)
        if plan.experts is None:
            # Parts of parameters, which keep their values until all of them are quantized.
            for state in map(block.weights.__getitem__, weights):
                stack = f"{plan.name}.{state.view.parameter}"
                run.kept.setdefault(stack, block.module.get_parameter(state.view.parameter).detach().clone())
                state.view.of(run.kept[stack]).copy_(state.result())
            return original(plan, block, weights)
        (number,) = {weight.expert for weight in weights.values()}
        for name, parameter in block.module.named_parameters():
            stack = f"{plan.name}.{plan.experts.info.module}.{name}"
            run.experts[stack, number] = parameter.detach().clone()
        return original(plan, block, weights)

    scheme, methods = llmq.Scheme(4, 32, True), tuple(method.split("+"))
    recipe = llmq.Recipe(methods=methods, scheme=scheme, ragged="channel", loader=loader, options=options)
    run = Run(job.plan(str(source), recipe, out=out, ids=windows))
    stream.pack_weights = mixture.pack_weights = remember
    try:
        job.quantize(str(source), out, recipe, ids=windows, made=run.plan)
    except llmq.LlmqError as error:
        raise Stopped(str(error).replace(str(source), "the source")) from error
    finally:
        stream.pack_weights = mixture.pack_weights = original
    return run


def quantized(
    source: Path, out: Path, windows: Tensor, ids: Tensor, method: str = "gptq", loader: str = "any", **options: object
) -> Quantized:
    """Quantize to 4 bits, load the result with stock transformers, compare with llmq's weights in memory.

    options: the method's, as a recipe has them.
    loader: if it is llmq, `llmq.load` loads the result, and stock transformers has to refuse it if experts are in it.
    Raises as `quantize`.
    """
    import llmq

    run = quantize(source, out, windows, method, loader, **options)
    reference = stock(source)
    before = logits(reference, ids)
    run.give(reference)
    target = logits(reference, ids)
    (share, left), moved = shares(run), apart(target, before)
    if loader != "llmq":
        loaded = stock(out)
        return Quantized(apart(logits(loaded, ids), target), moved, share, left, run.plan, corrected(out))
    refuse(out)
    loaded = llmq.load(out, dtype="float32", device_map="cpu")
    return Quantized(apart(logits(loaded, ids), target), moved, share, left, run.plan, corrected(out))


def corrected(out: Path) -> str:
    """How many weights a run corrected for errors in their inputs, and how many also for those in their stream."""
    import llmq

    found = [row.correction for row in llmq.Report.load(out).quantized if row.correction is not None]
    return f"{len(found)}, {sum(stream is not None for _, stream in found)}" if found else ""


def refuse(out: Path, kind: Any = AutoModelForCausalLM) -> None:
    """Raises Stopped unless stock transformers refuses a folder for llmq alone."""
    try:
        stock(out, kind)
    except ValueError as error:
        assert "format" in str(error) or "one to many" in str(error)
    else:
        raise Stopped("stock transformers loads it, which is for llmq alone")


def shares(run: Run) -> tuple[str, list[str]]:
    """How many of the 2-D weights in the blocks are quantized, and why the others are not."""
    inside = [i for i in run.plan.weights if i.block is not None and len(i.shape) == 2]
    chosen = [i for i in inside if i.scheme is not None]
    count = {True: sum(i.shape[0] * i.shape[1] for i in chosen), False: sum(i.shape[0] * i.shape[1] for i in inside)}
    share = f"{len(chosen)} of {len(inside)}, {count[True] / count[False]:.0%}"
    return share, sorted({str(i.reason) for i in inside if i.scheme is None})


def pairs_applied(real: PreTrainedModel, found: dict[str, Any], before: Tensor, ids: Tensor) -> dict[str, Any]:
    """Give every pair of every block a new random scale, then shift, in a loaded model; how far its logits move.

    error: ‖logits − before‖ / ‖before‖ after all; without: the same after the sources alone were scaled.
    """
    generator = torch.Generator().manual_seed(7)

    def scales(channels: int) -> Tensor:
        return torch.rand(channels, generator=generator) + 0.5

    kept = {name: p.detach().clone() for name, p in real.named_parameters()}
    everything = [(real.get_submodule(block), pair) for block, own in found.items() for pair in own.pairs]
    with torch.no_grad():
        for block, pair in everything:
            edit = pair.edits(scales(pair.channels))[pair.source]
            block.get_parameter(pair.source).copy_(edit.of(block.get_parameter(pair.source)))
        without = apart(logits(real, ids), before)
        for name, parameter in real.named_parameters():
            parameter.copy_(kept[name])
    for block, pair in everything:
        pair.apply(block, scales(pair.channels))
        if pair.shiftable:
            pair.apply_shift(block, scales(pair.channels) - 1)
    return {
        "error": apart(logits(real, ids), before),
        "without": without,
        "pairs": len(everything),
        "shiftable": sum(pair.shiftable for _, pair in everything),
        "rejected": sum(len(own.rejections) for own in found.values()),
    }
