"""Finds a model's decoder blocks, their weights, and which weights share an input, by running it, never by name.

The model is built without memory for its parameters and run on a few tokens with all parameters zero. See
docs/design.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmq.discovery.architecture import generator, not_causal, text_part
from llmq.discovery.calls import Call, Recording, Unreached, handed_in, record
from llmq.discovery.experts import ExpertsInfo, Places, Routed, describe, watch_experts
from llmq.discovery.matmuls import Matmul, Modules, watch_matmuls, watch_modules
from llmq.discovery.parameters import assign as assign
from llmq.discovery.parameters import empty as empty
from llmq.discovery.parameters import watch_used
from llmq.discovery.parameters import zeros as zeros
from llmq.discovery.parts import PartsInfo, call_experts, find_parts, find_routed, linears_of
from llmq.discovery.reasons import Kind, Reason
from llmq.discovery.routers import follow_products
from llmq.discovery.stock import UNPACKABLE, unpackable
from llmq.discovery.structure import BlockInfo as BlockInfo
from llmq.discovery.structure import Structure as Structure
from llmq.discovery.structure import WeightInfo as WeightInfo
from llmq.discovery.view import View
from llmq.errors import LlmqError, first_line

PROBE_TOKENS = 8
FEW_OUTPUTS = 16
ROUTER = Reason(Kind.ROUTER, "it decides which experts a token goes to")
BEHIND = Reason(Kind.BEHIND, "the output of the routed experts feeds it, which is not there when it is calibrated")
SMALL = Reason(Kind.SMALL, f"it has fewer than {FEW_OUTPUTS} outputs: servers do not read such weights packed")


def build(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model of `folder` in eval mode: parameters on the meta device, buffers computed. Raises LlmqError."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, PreTrainedModel
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        for part in _nested(config):
            part._experts_implementation = "eager"
        with init_empty_weights(include_buffers=False), no_init_weights():
            kind = generator(config)
            own = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
            model: nn.Module = (
                kind._from_config(config, dtype=dtype)
                if own
                else kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            )
        getattr(model, "tie_weights", lambda: None)()  # construction on the meta device unties parameters
    except Exception as error:  # with a wrong config, model code may fail in any way
        told = not_causal(_config_of(folder))
        told = told or (
            f"transformers cannot build this model: {first_line(error)}; its config.json is "
            "damaged, or for another version of transformers"
        )
        raise LlmqError(f"{folder}: {told}") from error
    return model.eval()


def _config_of(folder: Path) -> dict[str, Any]:
    """config.json as it is; empty if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _nested(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _nested(value)


def candidates(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The module lists of a model, those of its decoder first if it says which part that is; by number of parameters,
    largest first; of two equal ones the outer one first."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    decoder = getattr(model, "get_decoder", lambda: None)()
    inside = set() if decoder is None else {id(module) for module in decoder.modules()}
    return sorted(lists, key=lambda item: (id(item[1]) not in inside, -sum(p.numel() for p in item[1].parameters())))


class _Experts(LlmqError):
    """The blocks contain a mixture of experts."""


def find(model: nn.Module) -> Structure:
    """The model's blocks and their weights, by a run on a few tokens with zero parameters. Raises LlmqError."""
    reasons = []
    for path, modules in candidates(model)[:4]:
        named = {f"{path}.{i}": block for i, block in enumerate(modules)}
        try:
            try:
                return _structure(model, path, named)
            except Unreached as fault:
                reached = {name: block for i, (name, block) in enumerate(named.items()) if i in fault.called}
                return replace(
                    _structure(model, path, reached), unreached=tuple(name for name in named if name not in reached)
                )
        except _Experts as error:
            raise LlmqError(f"{path}: {error}") from error
        except LlmqError as error:
            reasons.append(f"{path}: {error}")
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            reasons.append(f"{path}: {type(error).__name__}: {first_line(error)}")
    if part := text_part(model):
        why = reasons[0] if reasons else "it has no module list"
        raise LlmqError(
            f"{type(model).__name__} does not run on text alone ({why}); its part {part} may: save that by itself "
            f"(model.{part}.save_pretrained) and quantize it"
        )
    raise LlmqError(
        f"no list of decoder blocks was found: {'; '.join(reasons) or 'the model has no module list'}; llmq quantizes "
        "models that are a list of blocks, which run one after the other"
    )


def _structure(model: nn.Module, path: str, named: dict[str, nn.Module]) -> Structure:
    """The structure of some blocks of the list at a path, by their names."""
    blocks = [*named.values()]
    owners = Counter(id(p) for b in blocks for p in b.parameters())
    with recorded(model, blocks) as (recording, used):
        found: dict[Any, tuple[BlockInfo, Any]] = {}
        hidden, calls = recording.hidden[0], recording.sampled()
        returned: list[Any] = []
        seen = [
            _inspect(name, block, call, hidden, owners, found, returned)
            for (name, block), call in zip(named.items(), calls, strict=True)
        ]
        _check_handed(model, blocks, recording, returned)
    return Structure(
        path, tuple(_packable(model, _without_small(seen))), outside=frozenset(used | _telling_device(model, path))
    )


def _telling_device(model: nn.Module, path: str) -> set[str]:
    """The first parameters of the modules around the list at a path: transformers takes the device from those."""
    around = [path.rpartition(".")[0]]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    first = {id(next(iter(model.get_submodule(owner).parameters()))) for owner in around}
    return {name for name, p in model.named_parameters() if id(p) in first and not name.startswith(f"{path}.")}


def _check_handed(model: nn.Module, blocks: list[nn.Module], recording: Recording, returned: list[Any]) -> None:
    """Raises LlmqError if blocks hand on other values than a recording shows, in which they return what the first does.

    returned: each block's own result.
    """
    kinds = [tree_map(type, result) for result in returned]
    others = {i: result for i, result in enumerate(returned) if kinds[i] != kinds[0]}
    if not others:
        return
    own = record(model, blocks, [_probe()], whole=True, first=lambda *_, **__: returned[0], returned=others)
    for i, (mine, call) in enumerate(zip(own.calls[0], recording.calls[0], strict=True)):
        if handed_in(mine) != handed_in(call):
            raise LlmqError(
                f"block {i} gets other values from the blocks before it than the first block hands on, "
                "which llmq cannot stream yet"
            )


def _probe() -> Tensor:
    return torch.zeros(1, PROBE_TOKENS, dtype=torch.long)


@contextmanager
def recorded(model: nn.Module, blocks: list[nn.Module]) -> Iterator[tuple[Recording, set[str]]]:
    """Each block's call on a few tokens, recorded with all parameters zero except the output embedding's; and the
    parameters outside the blocks that were read.

    Inside the context the parameters outside the blocks stay zero. Raises as `record`.
    """
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [n for n, p in model.named_parameters() if id(p) not in inside]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skip = set() if head is None else {id(p) for p in head.parameters()}
    with zeros(model, [n for n in outside if id(model.get_parameter(n)) not in skip or _is_input(model, n)]):
        with watch_used(model) as used, zeros(blocks[0]):
            recording = record(model, blocks, [_probe()], whole=True)
        yield recording, used


def _without_small(blocks: list[BlockInfo]) -> list[BlockInfo]:
    """The blocks; those of a mixture without the weights of few outputs, such as gates of shared experts."""
    if not any(block.mixture for block in blocks):
        return blocks
    found = []
    for block in blocks:
        small = {f"{block.name}.{w.view.parameter}": SMALL for w in block.weights if w.rows < FEW_OUTPUTS}
        weights = tuple(w for w in block.weights if w.rows >= FEW_OUTPUTS)
        found.append(replace(block, weights=weights, left=block.left | small))
    return found


def _packable(model: nn.Module, blocks: list[BlockInfo]) -> Iterator[BlockInfo]:
    bad = unpackable(model, [w.name for b in blocks for w in b.weights])
    for block in blocks:
        left = block.left | {f"{block.name}.{w.view.parameter}": UNPACKABLE for w in block.weights if w.name in bad}
        yield replace(block, weights=tuple(w for w in block.weights if w.name not in bad), left=left)


def _is_input(model: nn.Module, name: str) -> bool:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    parameter = model.get_parameter(name)
    return embeddings is not None and any(p is parameter for p in embeddings.parameters())


def _inspect(
    name: str,
    block: nn.Module,
    call: Call,
    hidden: Tensor,
    owners: Counter[int],
    found: dict[Any, tuple[BlockInfo, Any]],
    returned: list[Any],
) -> BlockInfo:
    """found: the structure and the result of those blocks that have run; returned: the results, to be appended to."""
    tied = {n for n, p in block.named_parameters() if owners[id(p)] > 1}
    make = structure_key(block, call, tied)
    if make not in found:
        with zeros(block), watch_matmuls(block) as matmuls, watch_modules(block) as modules, torch.inference_mode():
            routers: set[str] = set()
            choosing: set[str] = set()
            with follow_products(block) as following:

                def noticed(routed: Routed, output: Tensor) -> None:
                    routers.update(following.before(routed.choices))
                    choosing.update(following.made_of(routed.choices))
                    following.leave_out(output, routed.rows)
                    following.mark(output)

                with watch_experts(block, noticed) as called:
                    result = call.result(block, hidden)
                    routers |= choosing - following.made_of(call.hidden(result))
            experts, parts = _experts(block, called, list(matmuls), hidden)
        reasons = {} if parts else dict.fromkeys(following.behind, BEHIND)
        reasons |= dict.fromkeys(routers | (following.choosing if parts else set()), ROUTER)
        found[make] = _weights_of(block, matmuls, modules, hidden, tied, reasons, experts, parts), result
    known, result = found[make]
    returned.append(result)
    weights = tuple(replace(w, name=f"{name}.{w.name}") for w in known.weights)
    left = {f"{name}.{key}": reason for key, reason in known.left.items()}
    return replace(known, name=name, weights=weights, left=left)


def _experts(
    block: nn.Module, called: dict[str, list[Places]], matmuls: list[Matmul], hidden: Tensor
) -> tuple[ExpertsInfo | None, tuple[PartsInfo, ...]]:
    """The block's routed experts: to be run one at a time if they can be, else parts of its parameters.

    called: the modules that were called like experts; matmuls: of the block's run. Raises _Experts.
    """
    if len(called) > 1:
        raise _Experts(f"a block has several modules of experts ({', '.join(called)}), which llmq cannot stream yet")
    name, calls = next(iter(called.items()), ("", []))
    if len(calls) > 1:
        raise _Experts(f"a block calls its experts ({name}) more than once, which llmq cannot stream yet")
    alone = describe(block, name, calls[0]) if calls else None
    if isinstance(alone, ExpertsInfo):
        routed = find_routed(block, matmuls, hidden, [f"{alone.module}.{stack}" for stack in alone.stacks], shared=True)
        parts: list[PartsInfo] = []
    else:
        routed = find_routed(block, matmuls, hidden, [])
        within = block.get_submodule(name).named_parameters() if calls else ()
        routed += [n for n in (f"{name}.{own}" for own, p in within if p.dim() > 2) if n not in routed]
        more, inner = call_experts(block, name, calls[0], hidden) if calls else ([], set())
        parts = find_parts(block, routed, matmuls, more, inner, hidden.shape[:-1].numel())
    if routed and not parts:
        raise _Experts(
            f"the experts of {name} cannot be quantized yet: {alone}"
            if isinstance(alone, str)
            else f"mixture-of-experts models are not supported yet: {routed[0]} sees only the tokens routed to it"
        )
    return (None if isinstance(alone, str) else alone), tuple(parts)


def structure_key(block: nn.Module, call: Call, tied: set[str]) -> tuple[Any, ...]:
    """Key shared by structurally identical blocks, of which one is run; a block that writes to its call has its own."""
    shapes = tuple((n, tuple(p.shape), p.dtype, n in tied) for n, p in block.named_parameters())
    return type(block), shapes, _arguments(call), id(block) if _has_containers(call) else 0


def _has_containers(call: Call) -> bool:
    return any(isinstance(value, (MutableMapping, list)) for value in (*call.args, *call.kwargs.values()))


def _arguments(call: Call) -> tuple[Any, ...]:
    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__

    return tuple(kind(a) for a in call.args) + tuple((k, kind(v)) for k, v in call.kwargs.items())


def _weights_of(
    block: nn.Module,
    matmuls: list[Matmul],
    modules: Modules,
    hidden: Tensor,
    tied: set[str],
    reasons: dict[str, Reason],
    experts: ExpertsInfo | None,
    parts: tuple[PartsInfo, ...],
) -> BlockInfo:
    """reasons: parameters that are left alone because of where they are beside the experts."""
    linears = linears_of(block)
    known = {t.untyped_storage().data_ptr() for t in [hidden, *modules.norms]}
    inputs: dict[int, int] = {}
    weights: list[WeightInfo] = []
    left: dict[str, Reason] = {}
    stacks = set() if experts is None else {f"{experts.module}.{name}" for name in experts.stacks}
    stacks = stacks.union(*(found.names for found in parts))
    for parameter, value in block.named_parameters():
        if value.dim() < 2 or parameter in stacks:
            continue
        uses = [m for m in matmuls if m.parameter == parameter]
        count = modules.linears.get(linears[parameter], 0) if parameter in linears else None
        reason = reasons.get(parameter) or _reason(value, uses, count)
        if parameter in tied:
            left[parameter] = Reason(Kind.SHARED, "it is shared with another block")
        elif reason:
            left[parameter] = reason
        else:
            pointer = uses[0].input.untyped_storage().data_ptr() if uses[0].input is not None else 0
            input_id = inputs.setdefault(pointer, len(inputs))
            weights.append(
                WeightInfo(
                    linears[parameter], View(parameter), value.shape[0], value.shape[1], input_id, pointer not in known
                )
            )
    return BlockInfo("", tuple(weights), left, experts, parts)


def _reason(value: Tensor, uses: list[Matmul], calls: int | None) -> Reason | None:
    """Why a parameter is not quantized; None if it is the weight of a Linear module called once."""
    if not uses:
        return Reason(Kind.UNUSED, "no matrix product uses it")
    if calls is None:
        return Reason(Kind.NOT_LINEAR, "it is not the weight of a Linear module, and loaders replace only those")
    if not calls:
        return Reason(Kind.NOT_LINEAR, "its module is never called: the model reads the weight directly")
    if not all(u.whole for u in uses):
        return Reason(Kind.IN_PARTS, "it is used in slices, not as one matrix")
    if len(uses) > 1 or calls > 1:
        return Reason(Kind.REPEATED, "it is used more than once in a block")
    return None
