"""Start the ranks of a run on this machine, and stop all of them when one has failed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import typer

from llmq import ranks
from llmq.errors import LlmqError

COMMAND = (sys.executable, "-m", "llmq.cli")
GRACE = 10.0
"""The seconds that a rank has to end when it is told to."""
LOOK = 0.1


def enter(count: int) -> None:
    """Be one of `--ranks COUNT`, or of those that torchrun started; the first process starts them, and ends with them.

    Raises LlmqError if both say how many there are, and differently.
    """
    if count > 1 and ranks.asked() == 1:
        raise typer.Exit(launch(count, sys.argv[1:]))
    if count > 1 and count != ranks.asked():
        raise LlmqError(f"--ranks {count}, but torchrun started {ranks.asked()} ranks: leave --ranks out")
    ranks.start()


def launch(count: int, words: Sequence[str]) -> int:
    """Run `llmq WORDS` as so many ranks; returns the exit code of the first that failed, or 0.

    Each has its share of the processors, unless OMP_NUM_THREADS says how many threads it has.
    """
    threads = str(max(1, (os.cpu_count() or 1) // count))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), ranks.PARENT: str(os.getpid())}
    # What a torchrun around this process has said of its own ranks does not hold for these.
    others = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "GROUP_"))}
    environment = {"OMP_NUM_THREADS": threads} | others | shared
    processes = []
    try:
        for number in map(str, range(count)):
            mine = environment | {"RANK": number, "LOCAL_RANK": number}
            processes.append(subprocess.Popen([*COMMAND, *words], env=mine))
        while True:
            codes = [process.poll() for process in processes]
            failed = [(code, number) for number, code in enumerate(codes) if code]
            if failed:
                # One that was killed has a negative code; others that notice it end too.
                return _told(*min(failed), count)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(LOOK)
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(GRACE)  # it says what is kept
        return 130
    finally:
        _stop(processes)


def _told(code: int, failed: int, count: int) -> int:
    """Say which rank was killed (one that fails says itself why); returns the exit code."""
    if code > 0:
        return code
    why = signal.Signals(-code).name
    more = ": perhaps there was too little memory for so many ranks" if -code == signal.SIGKILL else ""
    print(
        f"error: rank {failed} of {count} on {socket.gethostname()} was killed ({why}){more}. What is finished is "
        "kept: the same command, with any number of ranks, resumes the run",
        file=sys.stderr,
    )
    return 128 - code


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
