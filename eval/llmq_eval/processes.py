"""Several processes (ranks) that evaluate together, connected by accelerate: each has its own copy of the model.

Batches of windows, and requests of tasks, are dealt to the ranks; what they measure comes back in the order that one
process measures in, so that every sum over it is the same. For one process every function here is the identity.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from llmq import ranks
from llmq.errors import LlmqError, first_line
from llmq.inference.pretrained import input_device
from llmq.machine import has_cuda
from llmq_eval.subject import check_device

T = TypeVar("T")


def connect(device: str) -> None:
    """Meet the other ranks. device: cpu, or cuda, of which each rank has a GPU of its own.

    Other libraries do otherwise from here on: compressed-tensors shares out what it does while a model is loaded, so
    all ranks load the same models in the same order. Raises LlmqError for a device that is not there.
    """
    if ranks.size() == 1:
        return
    check(device, ())
    # Before anything is told: a rank without a GPU says so itself.
    check_device(ranks.own_device(device))
    from accelerate import PartialState

    try:
        state = PartialState(cpu=device != "cuda" or not has_cuda(), timeout=ranks.PATIENCE)
    except (RuntimeError, ValueError) as problem:
        raise LlmqError(f"{ranks.name()}: the ranks do not find each other: {first_line(problem)}") from problem
    if state.num_processes != ranks.size():
        raise LlmqError(f"accelerate was set up before, for {state.num_processes} processes: use a new process")


def check(device: str, tasks: Sequence[str]) -> None:
    """Raise LlmqError for what several ranks cannot measure."""
    if ranks.size() == 1:
        return
    if device not in ("cpu", "cuda"):
        raise ranks.Common(
            f"--device {device} with several ranks: give cpu, or cuda, where each rank takes a GPU of its own"
        )
    if timed := [task for task in tasks if task in ("speed", "memory")]:
        raise ranks.Common(
            f"{timed[0]} is measured by one process, which has the machine to itself: leave out --ranks, or {timed[0]}"
        )


def own_place(device: str) -> str:
    """The device of this rank's inputs."""
    return input_device(ranks.own_device(device))


def everyone(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if ranks.size() == 1:
        return [value]
    from accelerate.utils import gather_object

    with ranks.waiting():
        found: list[T] = gather_object([value])
    return found


def mine(jobs: Sequence[T]) -> Sequence[T]:
    """The jobs of this rank: they go to the ranks in turn."""
    return jobs[ranks.rank() :: ranks.size()]


def first_alone(make: Callable[[], T]) -> T:
    """What `make` makes on each rank: first on rank 0, because it writes files that the others find there."""
    if ranks.size() == 1:
        return make()
    made: Any = None
    problem: str | None = None
    try:
        made = make() if ranks.first() else None
    except LlmqError as error:
        problem = str(error)
    if told := ranks.tell(problem):
        raise ranks.Common(told)
    with ranks.failing_together():
        return made if ranks.first() else make()


@contextlib.contextmanager
def first_heard() -> Iterator[None]:
    """Within the context only rank 0 prints: for code that draws its bars on every rank."""
    if ranks.first():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
