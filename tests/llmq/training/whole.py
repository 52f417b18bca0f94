"""A tiny model quantized up to the stage of distillation, for tests of it; and the same model in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq import job
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.recipe.recipe import Recipe
from llmq.streaming import stream
from llmq.training import distill
from llmq.training.student import StreamedStudent, open_student
from llmq.watch import Silent

IDS = torch.randint(256, (8, 24), generator=torch.Generator().manual_seed(0))


@contextmanager
def student_of(
    model: Path, out: Path, recipe: Recipe, dtype: torch.dtype | None = None, batch: int = 2
) -> Iterator[StreamedStudent]:
    """The student of a finished quantization of a model folder, at the moment at which it would be trained.

    dtype: that the model computes in from then on.
    """
    found: list[Any] = []

    def stop(io: Any, recording: Any, first: Any, teach: Any, *_: Any) -> None:
        found.extend((io, recording, first, teach))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "run", stop)
        patch.setattr("llmq.planning.types.BATCH_TOKENS", batch * IDS.shape[1])
        made = job.plan(str(model), recipe, out=out, ids=IDS)
        with pytest.raises(KeyboardInterrupt):
            job.quantize(str(model), out, recipe, ids=IDS, made=made)
        io, recording, first, _ = found
        if dtype is not None:
            io.plan.dtype = dtype
            io.plan.model.to(dtype)
            for one in first:
                one.hidden = one.hidden.to(dtype)
            recording.hidden = [hidden.to(dtype) for hidden in recording.hidden]
        teacher = stream.teach(io, first, None, recording, Silent())
        with open_student(io, recording, first, teacher, out / "training", "test", Silent()) as student:
            yield student


def whole_model(student: StreamedStudent, folder: Path) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """The unquantized model, the quantized one with weights made of leaves by autograd, and these leaves: factors and
    changes by their names in the student."""
    from transformers import AutoModelForCausalLM

    dtype = student.io.plan.dtype
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    leaves = {name: p.detach().clone().to(dtype).requires_grad_(True) for name, p in student.parameters.items()}
    for block in student.io.plan.blocks:
        for weight, q in student._open(block).weights:
            name = f"{block.name}.{weight.parameter}"
            put(other, name, dequantized(q, leaves[name]))
    for name, norm in student.norms.items():
        put(other, name, norm.value.to(dtype) + norm.size * leaves[name])
    return base, other, leaves


def dequantized(q: QuantizedWeight, factor: Tensor) -> Tensor:
    """ŵ = (point − zero) · s·f, by plain torch, in the factor's dtype."""
    points = rounding_of(q.scheme.rules).decode(q.codes, q.scheme).to(factor.dtype).view(*q.scale.shape, -1)
    zero = 0 if q.zero is None else q.zero.to(factor.dtype).unsqueeze(-1)
    return ((points - zero) * (q.scale.to(factor.dtype) * factor).unsqueeze(-1)).flatten(1)


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor that was computed in a parameter's place."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    del module._parameters[leaf]
    setattr(module, leaf, value)


def divergence(base: nn.Module, other: nn.Module, ids: Tensor) -> Tensor:
    """The mean over tokens of KL(base ‖ other) of the logits, written out."""
    with torch.no_grad():
        want = base(ids).logits.log_softmax(-1)
    have = other(ids).logits.log_softmax(-1)
    found: Tensor = (want.exp() * (want - have)).sum(-1).mean()
    return found
