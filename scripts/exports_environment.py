"""What exports are tried with: llama.cpp by llama-cpp-python, built from source, its converter, and mlx-lm.

Each is made where it is not there, in a folder that is kept: llama.cpp takes 6 minutes of processor time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"
BESIDE = ("sentencepiece", "protobuf", "gguf==0.19.0")
"""What the converter and transformers' reader of GGUF files import beside what llmq has."""
MLX = ("mlx-lm==0.32.2", "mlx[cpu]")
BUILD = ("numpy", "scikit-build-core", "cmake", "ninja")
OPTIONS = "-DGGML_BLAS=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF"


def llama(folder: Path) -> tuple[Path, Path]:
    """A python with llama-cpp-python, and the folder with its llama.cpp, in which the converter is.

    Raises CalledProcessError if it cannot be fetched or built.
    """
    python, source, stamp = folder / "llama" / "bin" / "python", folder / "source", folder / "llama" / "made"
    if not stamp.exists():
        shutil.rmtree(folder / "llama", ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        _venv(folder / "llama")
        pip(python, "install", *BUILD)
        pip(python, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(source), LLAMA)
        (archive,) = source.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        pip(python, "install", "--no-build-isolation", str(archive), CMAKE_ARGS=OPTIONS)
        stamp.touch()
    return python, next(source.glob("*/vendor/llama.cpp"))


def beside(folder: Path) -> str:
    """The PYTHONPATH with which llmq's own python runs the converter, and transformers reads GGUF files."""
    there = folder / "beside"
    if not there.exists():
        pip(Path(sys.executable), "install", "--no-deps", "--target", str(there), *BESIDE)
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(there)])


def mlx(folder: Path) -> Path:
    """A python with mlx-lm. Raises CalledProcessError if it cannot be installed."""
    python, stamp = folder / "mlx" / "bin" / "python", folder / "mlx" / "made"
    if not stamp.exists():
        shutil.rmtree(folder / "mlx", ignore_errors=True)
        _venv(folder / "mlx")
        pip(python, "install", *MLX)
        stamp.touch()
    return python


def _venv(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)


def pip(python: Path, *arguments: str, **environment: str) -> None:
    """Run pip of an environment."""
    command: Sequence[str] = [str(python), "-m", "pip", "--quiet", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=os.environ | environment)
