"""The models of an evaluation: each is loaded once, two are kept in memory if they fit, too large ones are refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmq import formats, ranks
from llmq.errors import LlmqError
from llmq.grids.cache import Cache
from llmq.machine import size
from llmq_eval import speed
from llmq_eval.perplexity import shown_dtype
from llmq_eval.processes import everyone, own_place
from llmq_eval.subject import Subject

if TYPE_CHECKING:
    from llmq_eval.options import Options

ROOM = 0.8
"""The fraction of free memory that two models at once may take."""


def free_memory(device: str) -> int:
    """Free memory on a device for each rank, in bytes: what the one with the least has, so that all decide alike."""
    import psutil
    import torch

    if (place := own_place(device)).startswith("cuda"):
        # torch reuses the memory of freed tensors.
        kept = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        free = int(torch.cuda.mem_get_info(place)[0] + kept)
    else:
        free = int(psutil.virtual_memory().available) // ranks.on_this_machine()
    return min(everyone(free))


class Models:
    """The models in memory: the one being measured, and the base if it is needed too and both fit."""

    def __init__(self, options: Options, note: Callable[[str], None] = lambda _: None) -> None:
        self.options, self.note = options, note
        self.there: dict[str, Any] = {}
        self.kept: set[str] = set()
        # By label: the dtype and backend that the model was loaded with, for the protocol.
        self.speeds: dict[str, speed.Speed] = {}
        self.shown: dict[str, str] = {}

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def load(self, subject: Subject) -> Any:
        from llmq.inference.pretrained import load_model

        o = self.options
        self.check(subject)
        try:
            model = load_model(
                subject.folder,
                dtype=o.dtype,
                device=ranks.own_device(o.device),
                trust_remote_code=o.trust_remote_code,
                progress=o.progress,
                kernels=o.kernels,
            )
        except LlmqError as error:
            if not subject.quantized or o.kernels or "cannot be loaded" not in str(error):
                raise
            raise LlmqError(
                f"{error}; this is stock transformers' error: try --kernels, which uses llmq's own readers"
            ) from error
        self.shown[subject.label] = shown_dtype(model, o.kernels)
        if subject.cache is not None:
            self._round_cache(model, subject, subject.cache)
        return model

    def _round_cache(self, model: Any, subject: Subject, cache: Cache) -> None:
        """Simulate a rounded cache, with the folder's scales if it has some."""
        from llmq.inference.cache import simulate, stored_scales

        stored = stored_scales(subject.folder, cache)
        count = simulate(model, subject.folder, cache, stored, self.options.trust_remote_code)
        self.note(f"{subject.given}: keys and values of {count} layers are rounded in a simulated cache")

    def get(self, subject: Subject, keep: bool = False) -> Any:
        """The model, loaded once. keep: until the end, not only until the next model is loaded."""
        if subject.label not in self.there:
            self.there[subject.label] = self.load(subject)
        if keep:
            self.kept.add(subject.label)
        return self.there[subject.label]

    def tokenizer(self, subject: Subject) -> Any:
        from llmq.inference.pretrained import load_tokenizer

        return load_tokenizer(subject.folder, trust_remote_code=self.options.trust_remote_code)

    def fit(self, *subjects: Subject) -> bool:
        """Whether the models that are not in memory yet would also fit, at their dense size."""
        each = 2 if self.options.dtype in ("bfloat16", "float16") else 4
        needed = each * sum({s.label: s.weights[0] for s in subjects if s.label not in self.there}.values())
        return needed <= ROOM * free_memory(self.options.device)

    def check(self, subject: Subject) -> None:
        """Raise LlmqError, with the remedies, if a model's weights alone take more memory than is free."""
        o = self.options
        count, nbytes, bits = subject.weights
        kernels = subject.quantized in formats.readers()
        packed = subject.quantized and ((o.kernels and kernels) or not formats.unpacked_by_stock(subject.quantized))
        place = own_place(o.device)
        if o.device == "auto" and (packed or not subject.quantized or place != "cpu"):
            return  # spread over several devices, or partly on disk
        each = 4 if o.dtype == "float32" else 2
        # A lower bound if the file does not say how many elements it holds.
        dense = nbytes if o.dtype == "auto" and not subject.quantized else count * each if bits else nbytes * each // 4
        needed = nbytes if packed else dense
        free = free_memory(o.device)
        shared = " for each rank" if ranks.size() > 1 else ""
        if needed > free:
            ways = ["--dtype bfloat16 takes half of that"] if not packed and o.dtype == "float32" else []
            ways += ["--kernels keeps its weights packed"] if kernels and not packed else []
            ways += ["--device auto keeps on disk what does not fit"] if not subject.quantized and not shared else []
            ways += ["fewer ranks have more memory each"] if shared and place == "cpu" else []
            # What is free was agreed on, so all ranks raise this.
            raise ranks.Common(
                f"{subject.given}: its weights take {size(needed)} of memory, and {size(free)} are free on "
                f"{place}{shared}: " + ("; ".join(ways) or "free some of it")
            )

    def drop(self, subject: Subject | None = None) -> None:
        """Free a model's memory, unless it is kept; without an argument, that of all models."""
        if subject is None:
            self.there.clear()
            self.kept.clear()
        elif subject.label not in self.kept:
            self.there.pop(subject.label, None)
        gc.collect()
