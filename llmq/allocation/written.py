"""The divergence of a written folder from the unquantized model, streamed: what an allocation cost in truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.allocation.judge import judging
from llmq.checkpoint.sink import Sink
from llmq.machine import give_back
from llmq.planning.types import Plan
from llmq.streaming import stream
from llmq.streaming.block_io import BlockIO
from llmq.watch import Watch


def divergence(plan: Plan, sink: Sink, batches: Sequence[Tensor], device: torch.device, watch: Watch) -> float:
    """KL(unquantized ‖ written) of the logits, the mean over the tokens of some windows, in nats.

    plan: in float32 (`allocate.widened`), of the folder that the sink has written; batches: token ids
    [windows, tokens].
    """
    io = BlockIO(plan, device, sink)
    recording = stream.record_calls(io, watch, batches)
    base = written = recording.states()
    watch.stage("Measuring what was written", len(plan.blocks))
    for block in plan.blocks:
        base = stream.unquantized(io, block, base, recording)
        written = stream.rerun(io, block, written, recording)
        give_back()
        watch.step(block.name)
    found = []
    with judging(io, base[0].hidden, batches[0].shape) as judge:
        outside = {name: plan.outside.get(plan.links.source.get(name, "")) for name in judge.known}
        changed = {n: io.read_back(weight).to(device) for n, weight in outside.items() if weight is not None}
        for one, other, ids in zip(base, written, batches, strict=True):
            found.append(judge.divergence(one.hidden, other.hidden, ids.shape, changed))
    return float(torch.cat(found).mean())
