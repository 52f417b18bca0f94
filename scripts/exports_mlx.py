"""Runs MLX folders in mlx-lm, in the environment that `exports_environment.py` makes: on a CPU, in float32.

`exports_mlx.py REFERENCE.npz FOLDER…`: the largest difference of its logits. Prints a JSON line for each folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model

FLOATS = (mx.bfloat16, mx.float16)


def exact(value: Any) -> Any:
    """A tensor in float32, if it is one of floats."""
    return value.astype(mx.float32) if value.dtype in FLOATS else value


def main(reference: str, folders: list[str]) -> None:
    """See the module."""
    mx.set_default_device(mx.cpu)
    stored = np.load(reference)
    for folder in folders:
        try:
            model, _ = load_model(Path(folder))
        except Exception as error:
            say(folder, refused=f"{type(error).__name__}: {error}"[:200])
            continue
        model.update(tree_map(exact, model.parameters()))
        found = np.array(model(mx.array(stored["tokens"].astype(np.int32))).astype(mx.float32))
        say(folder, away=float(np.abs(found - stored["logits"]).max()))


def say(folder: str, **found: Any) -> None:
    """Print what was found of a folder."""
    print("RESULT " + json.dumps({"folder": Path(folder).name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
