"""Runs GGUF files in llama.cpp (llama-cpp-python), in the environment that `exports_environment.py` makes.

`compare REFERENCE.npz FILE…`: log-probabilities of its tokens against its own. `divergence BASE.gguf TOKENS.npz FILE…`:
KL of the files' distributions to those of BASE, over all tokens. `refer FILE REFERENCE.npz`: the file's
log-probabilities take the place of the reference's. `quantize IN.gguf OUT.gguf TYPE [IMPORTANCE.npz]`:
llama.cpp's own quantization, with an importance for each input of a tensor. Prints a JSON line for each file. Without
llama.cpp's repacked weight buffers, which crashed here, with its own files too.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama as inner
import numpy as np

PURE = " pure"
FLOAT32, BFLOAT16 = 0, 30
"""ggml's numbers of types."""
original = llama_cpp.llama_model_default_params


def parameters() -> Any:
    """The default parameters of a model, without repacked buffers."""
    made = original()
    made.use_extra_bufts = False
    return made


llama_cpp.llama_model_default_params = parameters
inner.llama_cpp.llama_model_default_params = parameters


class Model:
    """One file. The cache is float32, so that it adds no rounding of its own."""

    def __init__(self, file: str, length: int) -> None:
        self.llama = llama_cpp.Llama(
            model_path=file, n_ctx=length + 8, n_batch=length + 8, n_ubatch=length + 8, logits_all=True, n_gpu_layers=0,
            n_threads=1, n_threads_batch=1, type_k=FLOAT32, type_v=FLOAT32, flash_attn=False, verbose=False,
        )  # fmt: skip

    def log_probabilities(self, row: Any) -> Any:
        """Of every token after each of a row: float64 [tokens, vocabulary]."""
        self.llama.reset()
        self.llama.eval(row.tolist())
        logits = np.array(self.llama.scores[: len(row)], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(reference: str, files: list[str]) -> None:
    """See the module."""
    stored = np.load(reference)
    rows = stored["tokens"]
    for file in files:
        try:
            model = Model(file, rows.shape[1])
        except ValueError as error:
            say(file, refused=str(error))
            continue
        found = [model.log_probabilities(row)[np.arange(len(row) - 1), row[1:]] for row in rows]
        away = np.array(found) - stored["logprob"]
        say(file, rms=float(np.sqrt((away**2).mean())), largest=float(np.abs(away).max()))


def refer(file: str, reference: str) -> None:
    """See the module."""
    rows = np.load(reference)["tokens"]
    model = Model(file, rows.shape[1])
    found = [model.log_probabilities(row)[np.arange(len(row) - 1), row[1:]] for row in rows]
    np.savez(reference, tokens=rows, logprob=np.array(found))


def divergence(base: str, tokens: str, files: list[str]) -> None:
    """See the module."""
    rows = np.load(tokens)["tokens"]
    model = Model(base, rows.shape[1])
    wanted = [model.log_probabilities(row).astype(np.float32) for row in rows]
    del model
    say(base, nll=nll(wanted, rows))
    for file in files:
        model = Model(file, rows.shape[1])
        total, own = 0.0, 0.0
        for row, target in zip(rows, wanted, strict=True):
            found, exact = model.log_probabilities(row), target.astype(np.float64)
            total += float((np.exp(exact) * (exact - found)).sum(-1).mean()) / len(rows)
            own += nll([found], row[None]) / len(rows)
        say(file, kl=total, nll=own)
        del model


def quantize(file: str, out: str, kind: str, importance: str | None) -> None:
    """See the module. The embeddings stay in bfloat16, as in the files that these are compared with. kind: a type, or
    one and ' pure': all other matrices are then of that type, without llama.cpp's own choice of larger ones; ALL_F32
    dequantizes."""
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.nthread = 1
    plain = kind == "ALL_F32"
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'' if plain else 'MOSTLY_'}{kind.removesuffix(PURE)}")
    wanted.pure, wanted.allow_requantize = kind.endswith(PURE), plain
    wanted.token_embedding_type = wanted.output_tensor_type = FLOAT32 if plain else BFLOAT16
    stored = dict(np.load(importance)) if importance else {}
    entries = (Importance * (len(stored) + 1))()
    for entry, (name, values) in zip(entries, stored.items(), strict=False):
        stored[name] = values = np.ascontiguousarray(values, dtype=np.float32)
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if stored:
        wanted.imatrix = ctypes.cast(entries, type(wanted.imatrix))
    failed = llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(wanted))
    say(out, failed=failed)


class Importance(ctypes.Structure):
    """llama.h's llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


def nll(found: list[Any], rows: Any) -> float:
    """The mean negative log-probability of the next token."""
    return float(-np.mean([f[np.arange(len(r) - 1), r[1:]].mean() for f, r in zip(found, rows, strict=True)]))


def say(file: str, **found: Any) -> None:
    """Print what was found of a file."""
    print("RESULT " + json.dumps({"file": Path(file).name, "nbytes": Path(file).stat().st_size, **found}), flush=True)


if __name__ == "__main__":
    kind, first, *rest = sys.argv[1:]
    if kind == "compare":
        compare(first, rest)
    elif kind == "refer":
        refer(first, rest[0])
    elif kind == "quantize":
        quantize(first, rest[0], rest[1], rest[2] if len(rest) > 2 else None)
    else:
        divergence(first, rest[0], rest[1:])
