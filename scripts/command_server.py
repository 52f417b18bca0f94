"""Run `llmq` commands of one version of the code, each in a fork; started by scripts/compare_bytes.py.

    PYTHONPATH=TREE:TREE/kernels:TREE/eval python -P scripts/command_server.py TREE llmq.cli:main

All modules are imported once, by running `llmq plan`. Each line of standard input, a JSON list of the command's words
and a log file, is then run in a fork, which is as isolated as a new process but starts seconds sooner. Its exit code is
written as a line of standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None], words: list[str], log: str) -> None:
    """Run one command in this process, with its output in the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["llmq", *words]
    try:
        main()
    finally:
        sys.stdout.flush()


def serve(tree: Path, entry: str) -> None:
    """Answer requests until standard input ends."""
    module, _, function = entry.partition(":")
    main = getattr(importlib.import_module(module), function)
    for name in ("llmq", "llmq_kernels"):
        place = importlib.import_module(name).__file__
        assert place and Path(place).is_relative_to(tree), f"{name} comes from {place}, not from {tree}"
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with contextlib.suppress(SystemExit):  # every command ends with SystemExit
        run(main, ["plan", "demo"], os.devnull)
    for line in commands:
        words, log = json.loads(line)
        child = os.fork()
        if not child:
            run(main, words, log)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
