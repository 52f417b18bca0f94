"""Several processes that work on one model together: which of them this one is, and what they tell each other.

Every process, a rank, runs the same code and makes the same decisions. Batches of calibration windows are dealt to the
ranks, weights are quantized by one of them each, and rank 0 alone writes. A sum over batches is passed from rank to
rank in the order of batches (`relay`), so that it has the bytes that one process computes. For one process every
function here is the identity.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from llmq.errors import LlmqError, first_line
from llmq.machine import has_cuda

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
J = TypeVar("J")
PATIENCE = timedelta(days=2)
"""How long a rank waits for another: a dead one is noticed by its closed connections, and by what started it."""


PARENT = "LLMQ_STARTED_BY"
"""The environment variable with the process that started the ranks, where that is llmq: they end with it."""


class Lost(LlmqError):
    """Another rank ended while this one waited for it."""


class Common(LlmqError):
    """What all ranks failed by, or know that one failed by."""


@dataclasses.dataclass
class _Group:
    """The ranks of this run. hand: how many batches are dealt to a rank at a time; alone: within `alone`."""

    rank: int = 0
    size: int = 1
    hand: int = 1
    alone: bool = False


_group = _Group()


STARTERS = (PARENT, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
"""Environment variables of what starts ranks; others set RANK and WORLD_SIZE too, for programs of their own."""


def asked() -> int:
    """How many ranks this process was started as one of (torchrun's WORLD_SIZE); 1 for one process."""
    number, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    started = any(variable in os.environ for variable in STARTERS)
    return int(count) if started and number.isdecimal() and count.isdecimal() else 1


def launched() -> bool:
    """Whether llmq itself started the ranks, and tells which of them was lost."""
    return PARENT in os.environ


def on_this_machine() -> int:
    """How many ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group.size > 1 else 1


def start() -> None:
    """Be the rank that the environment says (torchrun's, or that of `--ranks`).

    The others are met when there is something to tell them: other libraries do otherwise while ranks are connected.
    """
    if asked() == 1 or _group.size > 1:
        return
    _group.rank, _group.size = int(os.environ["RANK"]), asked()
    if launched():
        threading.Thread(target=_end_with, args=[int(os.environ[PARENT])], daemon=True).start()


def _connected() -> ModuleType:
    """torch.distributed, with all ranks connected. Raises LlmqError if they are not there."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if has_cuda() and dist.is_nccl_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as problem:
            raise LlmqError(f"{name()}: the ranks do not find each other: {first_line(problem)}") from problem
    return dist


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(3)


def stop() -> None:
    """Leave the other ranks, when all work is done."""
    if _group.size > 1:
        _connected().destroy_process_group()
        _group.rank, _group.size = 0, 1


def rank() -> int:
    """The number of this process among the ranks; 0 for one process."""
    return 0 if _group.alone else _group.rank


def size() -> int:
    """The number of ranks."""
    return 1 if _group.alone else _group.size


def first() -> bool:
    """Whether this is the rank that writes and reports."""
    return _group.rank == 0


def name(number: int | None = None) -> str:
    """A rank in words, by default this one: 'rank 1 of 2 on host'."""
    number = _group.rank if number is None else number
    return f"rank {number} of {_group.size}" + (f" on {socket.gethostname()}" if number == _group.rank else "")


def own_device(device: str) -> str:
    """The device of this rank: of 'cuda', the GPU with its number on this machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and _group.size > 1 else device


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this rank works by itself, as one process does."""
    before, _group.alone = _group.alone, True
    try:
        yield
    finally:
        _group.alone = before


def deal(batches: int, most: int) -> None:
    """Say how many batches there are, and how many a rank gets at a time: at most so many, and fewer if a rank's share
    of all is smaller."""
    _group.hand = max(1, min(most, -(-batches // size())))


def mine(batches: int) -> list[int]:
    """Which of all batches this rank has: hands of batches go to the ranks in turn."""
    return [batch for batch in range(batches) if _owner(batch) == rank()]


def _owner(batch: int) -> int:
    return batch // _group.hand % size()


def owners(batches: Sequence[int]) -> list[int]:
    """Which rank has each of some batches."""
    return [_owner(batch) for batch in batches]


def evenly(batches: Sequence[int]) -> list[int]:
    """Which rank runs each of some batches, so that none runs more than its share: the one that has it, if it can."""
    most, counts, runners = -(-len(batches) // size()), [0] * size(), owners(batches)
    for place, owner in enumerate(runners):
        runners[place] = owner if counts[owner] < most else -1
        counts[owner] += runners[place] == owner
    for place, runner in enumerate(runners):
        if runner < 0:
            runners[place] = counts.index(min(counts))
            counts[runners[place]] += 1
    return runners


def hands(count: int) -> list[range]:
    """The numbers of this rank's `count` batches among its own, a hand at a time; as many hands on every rank."""
    if size() == 1:
        return [range(count)]
    turns = -(-max(everyone(count)) // _group.hand)
    return [range(min(count, t * _group.hand), min(count, (t + 1) * _group.hand)) for t in range(turns)]


def everyone(value: T) -> list[T]:
    """The values of all ranks, in their order; tensors come back on the CPU."""
    if size() == 1:
        return [value]
    dist = _connected()
    found: list[Any] = [None] * size()
    with waiting():
        dist.all_gather_object(found, moved(value, "cpu"))
    return found


def gather(values: Iterable[T]) -> list[T]:
    """What the ranks have of each of their batches, in the order of all batches; tensors come back on the CPU."""
    values = list(values)
    if size() == 1:
        return values
    every = everyone(values)
    left = [iter(one) for one in every]
    return [next(left[_owner(batch)]) for batch in range(sum(map(len, every)))]


def share(costs: Sequence[float]) -> list[int]:
    """Which rank does each of some jobs: consecutive ones, of about the same cost in all."""
    whole, before, owners = sum(costs), 0.0, []
    for cost in costs:
        owners.append(min(size() - 1, int((before + cost / 2) / whole * size())) if whole else 0)
        before += cost
    return owners


def spread(jobs: Iterable[J], work: Callable[[J], T]) -> Iterator[tuple[J, T]]:
    """Each job with its result, in order, on all ranks: jobs are done by the ranks in turn, side by side, and each by
    itself."""
    jobs = list(jobs)
    for start in range(0, len(jobs), size()):
        now = jobs[start : start + size()]
        result: Any = None
        if rank() < len(now):
            job = now[rank()]
            with alone():
                result = work(job)
        for owner, job in enumerate(now):
            yield job, tell(result, owner)


def tell(value: T, owner: int = 0, device: torch.device | str = "cpu") -> T:
    """The value of one rank, on all; tensors come on a device."""
    if size() == 1:
        return value
    dist = _connected()
    told = [moved(value, "cpu") if rank() == owner else None]
    with waiting():
        dist.broadcast_object_list(told, src=owner)
    return value if rank() == owner else moved(told[0], device)


def lend(value: T | None, owner: int, taker: int) -> T | None:
    """The value of one rank, as it is, on another; None on all others."""
    told: list[Any] = [value]
    with waiting():
        if rank() == owner:
            _connected().send_object_list(told, taker)
        elif rank() == taker:
            _connected().recv_object_list(told, owner)
    return told[0] if rank() == taker else None


def relay(sums: Sequence[tuple[Tensor, Callable[[], object]]]) -> None:
    """Sums over the batches of a hand of each rank: each tensor comes from the rank before, this rank's function adds
    its own in place, and it goes to the next. Afterwards all ranks have it.

    While a rank adds to the second tensor, the next adds to the first: of several, all ranks are busy.
    """
    if size() == 1:
        for _, add in sums:
            add()
        return
    dist = _connected()
    me, last = rank(), size() - 1
    with waiting():
        sent = []
        for tensor, add in sums:
            if me > 0:
                dist.recv(tensor, me - 1)
            add()
            if me < last:
                sent.append(dist.isend(tensor, me + 1))
        for one in sent:
            if one is not None:
                one.wait()
        for tensor, _ in sums:
            dist.broadcast(tensor, last)


def total(
    into: Tensor, parts: Mapping[int, Tensor], batches: Sequence[int], runners: Sequence[int] | None = None
) -> Tensor:
    """The sum of a tensor of each of some batches, in this order, of which each rank has some; on all ranks.

    into: the memory for it; runners: which rank has the tensor of each batch, by default that which has the batch.
    """
    having = list(owners(batches) if runners is None else runners)
    if size() == 1:
        into.copy_(parts[batches[0]])
        for batch in batches[1:]:
            into.add_(parts[batch])
        return into
    dist = _connected()
    with waiting():
        for place, batch in enumerate(batches):
            if having[place] != rank():
                continue
            if place == 0:
                into.copy_(parts[batch])
            else:
                if having[place - 1] != rank():
                    dist.recv(into, having[place - 1])
                into.add_(parts[batch])
            if having[place + 1 : place + 2] not in ([], [rank()]):
                dist.send(into, having[place + 1])
        dist.broadcast(into, having[-1])
    return into


def relay_state(state: dict[str, Any], add: Callable[[], object], device: torch.device) -> None:
    """The same for whatever a dict of tensors and plain values is the state of: `add` changes its values."""
    if size() == 1:
        add()
        return
    dist = _connected()
    me, last = rank(), size() - 1
    with waiting():
        if me > 0:
            told: list[Any] = [None]
            dist.recv_object_list(told, me - 1)
            state.update(moved(told[0], device))
        add()
        if me < last:
            dist.send_object_list([moved(state, "cpu")], me + 1)
    state.update(tell(dict(state), last, device))


def agree(told: Mapping[str, Any], what: str) -> None:
    """Raises LlmqError if the ranks differ in something that all of them have to have in common."""
    found = everyone((name(), dict(told)))
    for who, other in found[1:]:
        differ = sorted(key for key in {**found[0][1], **other} if found[0][1].get(key) != other.get(key))
        if differ:
            raise Common(f"{who} has another {what} ({', '.join(differ)}) than {found[0][0]}: start all alike")


@contextmanager
def failing_together() -> Iterator[None]:
    """If a rank fails with an LlmqError in the context, all do, with the message of the first; no rank waits for it."""
    problem: LlmqError | None = None
    try:
        yield
    except LlmqError as error:
        if size() == 1 or isinstance(error, Lost):
            raise
        problem = error
    found = everyone((name(), None if problem is None else str(problem)))
    told = next(((who, message) for who, message in found if message is not None), None)
    if told is not None:
        every = all(message == told[1] for _, message in found)
        raise Common(told[1] if every else f"{told[0]}: {told[1]}") from problem


@contextmanager
def waiting() -> Iterator[None]:
    """Within the context this rank waits for others. Raises Lost if one has ended."""
    try:
        yield
    except (RuntimeError, ValueError) as problem:
        raise Lost(
            f"{name()}: another rank has ended ({first_line(problem)[:120]}); what is finished is kept, and the same "
            "command, with any number of ranks, resumes the run"
        ) from problem


def moved(value: Any, device: torch.device | str) -> Any:
    """A value with all tensors in it on a device: of dataclasses, dicts, lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: moved(part, device) for name, part in fields.items()})
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
