"""Train the scales and norms of a written model, and write them: the stage after all blocks.

What was trained is decided, and noted in the journal, before the first shard is written again; a shard is computed from
the old one and the state of training, and then replaced as a whole. So a killed run goes on training from its last
look, or goes on writing, and ends in the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict

from torch import Tensor

from llmq import ranks
from llmq.discovery.calls import Recording, States
from llmq.errors import LlmqError
from llmq.machine import give_back
from llmq.training.student import StreamedStudent, open_student
from llmq.training.trained import IO
from llmq.watch import Watch

STAGE = "distilled"
"""Its name in the journal, and of its folder; of a unit that is written again, too."""


def run(
    io: IO,
    recording: Recording,
    first: list[States],
    teach: Callable[[], list[Tensor]],
    signature: Callable[[Tensor], list[float]],
    watch: Watch,
) -> None:
    """Train what is written by the recipe's last method, and write it again if that is better on held-out windows.

    first: what the first block gets for each batch of this rank; teach: computes the unquantized model's last hidden
    states for these; signature: of a block's output, for the journal. Raises LlmqError.
    """
    sink, folder = io.sink, io.sink.state_of(STAGE)
    tuner = io.plan.pipeline.tuner
    assert tuner is not None
    told = sink.done.get(STAGE)
    if told is None or (told["kept"] and not sink.done[io.plan.blocks[-1].unit].get(STAGE)):
        began = time.perf_counter()
        of = sink.digest() if told is None else told["of"]
        with open_student(io, recording, first, teach() if told is None else None, folder, of, watch) as student:
            with ranks.failing_together():
                if told is not None and not student.saved:
                    lost = f"{folder} does not have what was trained any more"
                    raise LlmqError(f"{lost}: delete {sink.out} and start again")
            watch.stage("Distilling", getattr(tuner, "steps", 0))
            result = tuner.tune(student)
            if told is None:
                scales = sum(p.numel() for name, p in student.parameters.items() if name not in student.norms)
                told = asdict(result) | {"kept": result.at > 0, "of": of, "windows": len(io.plan.ids)}
                told |= {"scales": scales, "norms": len(student.norms)}
                sink.record(STAGE, told | {"seconds": round(time.perf_counter() - began, 2)})
            if told["kept"]:
                write(io, student, signature, watch)
        give_back()
    if ranks.first():
        shutil.rmtree(folder, ignore_errors=True)


def write(io: IO, student: StreamedStudent, signature: Callable[[Tensor], list[float]], watch: Watch) -> None:
    """Write what was trained, a unit after the other: first what is outside the blocks, then the blocks in order.

    Units that were written by a killed run are left as they are. Rank 0 writes, the others follow.
    """
    sink, blocks = io.sink, io.plan.blocks
    outside: dict[str, dict[str, Tensor]] = {}
    for name, norm in student.norms.items():
        if name in student.tail.found.gains:
            unit = sink.unit_of(norm.tensor)
            assert unit is not None
            outside.setdefault(unit, {})[norm.tensor] = norm.moved(student.parameters[name].detach())
    watch.stage("Writing scales", len(outside) + len(blocks))
    for unit, found in outside.items():
        if not sink.done[unit].get(STAGE):
            tensors = sink.read_unit(unit) | found if ranks.first() else {}
            sink.replace(unit, tensors, sink.done[unit] | {STAGE: True})
        watch.step(unit)
    states = [student.data.first[0]] if ranks.first() else []
    for block in blocks:
        done = sink.done[block.unit]
        if done.get(STAGE):
            student.settle(block)
        states = student.step(block, states, [0] if ranks.first() else [])
        if not done.get(STAGE):
            tensors = sink.read_unit(block.unit) | student.tensors(block) if ranks.first() else {}
            told = {"signature": signature(states[0].hidden)} if ranks.first() else {}
            sink.replace(block.unit, tensors, done | told | {STAGE: True})
        watch.step(block.unit)
