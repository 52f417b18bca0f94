"""Several ranks, as forks of the test's own process, which all run one function."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from llmq import ranks
from llmq.cli.launch import free_port


def together(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank, or the exception that it raises; None of a rank that ends without either."""
    fork = multiprocessing.get_context("fork")
    port, found, processes = str(free_port()), [], []
    for number in range(count):
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_become, args=(number, count, port, work, theirs), daemon=True)
        process.start()
        theirs.close()
        found.append(ours)
        processes.append(process)
    results = [_received(one) for one in found]
    for process in processes:
        process.join(60)
    return results


def _received(one: Connection) -> Any:
    try:
        return pickle.loads(one.recv_bytes())
    except EOFError:
        return None


def _become(number: int, count: int, port: str, work: Callable[[], Any], out: Connection) -> None:
    told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    try:
        ranks.start()
        out.send_bytes(pickle.dumps(work()))
    except Exception as problem:
        out.send_bytes(pickle.dumps(problem))
    finally:
        out.close()
        os._exit(0)
