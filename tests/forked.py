"""The command line in processes of their own that start at once: forks of one that has imported what others wrote.

All of llmq is new in each of them, and so are its arguments, its environment and its exit code. Each ends as
multiprocessing ends a fork, without taking down what others wrote, which would take longer than most commands.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("torch", "transformers.models.llama.modeling_llama", "transformers.models.qwen3_moe.modeling_qwen3_moe")
IMPORTED += ("compressed_tensors", "typer", "rich.console", "scipy.stats", "accelerate", "datasets")


class Command:
    """A command that runs or has run; returncode: None until its end was seen; what it prints goes to `folder`."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder, self.pid = server, folder, int(server.read())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self.returncode is None and select.select([self.server.answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Its exit code, once it has ended; a signal's is negative."""
        if self.returncode is None:
            self.returncode = int(self.server.read())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it printed."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it printed as errors and progress."""
        return (self.folder / "stderr").read_text()


class Server:
    """The process that is forked, one command at a time; `env` is there already when it imports what others wrote."""

    def __init__(self, folder: Path, **env: str) -> None:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-P", __file__], env=env, bufsize=0, **pipes)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.folder, self.started = folder, 0

    def read(self) -> bytes:
        """One line of its answer."""
        return self.answers.readline()

    def start(self, *words: object, path: Sequence[Path] = (), **env: str) -> Command:
        """Start `llmq` with these words once the one before has ended; `path` comes before all that Python looks in."""
        self.started += 1
        (folder := self.folder / str(self.started)).mkdir(parents=True)
        ask = {"words": [*map(str, words)], "folder": str(folder), "path": [*map(str, path)], "env": env}
        self.requests.write(json.dumps(ask).encode() + b"\n")
        return Command(self, folder)

    def run(self, *words: object, path: Sequence[Path] = (), **env: str) -> Command:
        """`start`, and wait."""
        command = self.start(*words, path=path, **env)
        command.wait()
        return command

    def close(self) -> None:
        """Ends once nothing runs."""
        self.requests.close()
        self.process.wait(60)


def _become(ask: dict[str, Any]) -> None:
    """Run the command in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(ask["env"])
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        os.dup2(os.open(Path(ask["folder"]) / name, os.O_RDWR | os.O_CREAT), number)
    sys.path[:0] = ask["path"]
    sys.argv = ["llmq", *ask["words"]]
    from llmq.cli import main

    main()


def _serve() -> None:
    import importlib
    import multiprocessing

    for name in IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = multiprocessing.get_context("fork").Process(target=_become, args=(json.loads(line),))
        child.start()
        print(child.pid, file=answers, flush=True)
        child.join()
        print(child.exitcode, file=answers, flush=True)


if __name__ == "__main__":
    _serve()
