"""The class that a checkpoint's config.json names, where it holds more than the causal one: a vision tower, an encoder.

A server, or transformers without a word to the contrary, opens the folder as that class, so its weights must be as
well described as those that are quantized. transformers itself is asked: on the meta device its own loader takes the
names and shapes of tensors, without their values.
"""

from __future__ import annotations

import logging as levels
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.discovery.architecture import suggested
from llmq.discovery.rename import renamer
from llmq.errors import LlmqError, first_line

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""A checkpoint's tensors: name → (dtype, shape)."""


@dataclass(frozen=True)
class Refused:
    """What transformers' loader does not accept, by names in the model, sorted.

    missing: parameters that it fills with random numbers; mismatched: of another shape.
    """

    missing: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.mismatched)

    def beyond(self, other: Refused) -> Refused:
        """What is not in `other` too; a parameter's name may have a format's suffix in one of them."""
        known = {_stem(name) for name in (*other.missing, *other.mismatched)}
        return Refused(*(tuple(n for n in names if _stem(n) not in known) for names in (self.missing, self.mismatched)))


class Named:
    """The model that config.json names, on the meta device.

    model: it; parameters: tensor of the checkpoint → its name in the model's state, for every tensor that it loads.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model
        renamed, state = renamer(model), model.state_dict()
        targets = ((name, renamed(name)[0]) for name in names)
        self.parameters = {name: target for name, target in targets if target in state}

    @property
    def name(self) -> str:
        """The class's name."""
        return type(self.model).__name__

    def refused(self, tensors: Tensors, quantization: Mapping[str, Any] | None = None) -> Refused:
        """What its `from_pretrained` would not accept of these tensors, with this `quantization_config`.

        Raises LlmqError if it cannot be asked: the format's package is missing, or reads values while loading.
        """
        config: Any = deepcopy(self.model.config)
        # That of a source which is dequantized when read does not describe these tensors.
        vars(config).pop("quantization_config", None)
        if quantization is not None:
            config.quantization_config = deepcopy(dict(quantization))
        state: dict[str, Tensor] = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in tensors.items()
        }
        try:
            with quiet():
                _, told = type(self.model).from_pretrained(  # type: ignore[attr-defined]
                    None,
                    config=config,
                    state_dict=state,
                    device_map="meta",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # a loader of another package may fail in any way
            raise LlmqError(f"{self.name}, which config.json names, was not tried: {first_line(error)}") from error
        mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in told["mismatched_keys"])
        return Refused(tuple(sorted(told["missing_keys"])), tuple(mismatched))

    def converted(self, quantization: Mapping[str, Any]) -> set[str]:
        """The modules whose weights it takes as quantized by this `quantization_config`; needs no values.

        Raises LlmqError if it cannot be asked.
        """
        from transformers.quantizers.auto import AutoHfQuantizer

        model: Any = deepcopy(self.model)
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            with quiet():
                asked = AutoHfQuantizer.from_config(deepcopy(dict(quantization)), pre_quantized=True)
                asked.preprocess_model(model=model, device_map=None, checkpoint_files=None)
        except Exception as error:  # as in `refused`
            raise LlmqError(f"{self.name}, which config.json names, was not tried: {first_line(error)}") from error
        return {name for name, module in model.named_modules() if type(module) is not before.get(name)}


def named(folder: Path, causal: nn.Module, names: list[str], trust_remote_code: bool = False) -> Named | None:
    """The model that a folder's config.json names, unless that is of the causal model's own class, or unknown.

    names: the checkpoint's tensors. Raises LlmqError if transformers has the class but cannot build it.
    """
    config, kind = _kind(folder, trust_remote_code)
    # By name: a class of the checkpoint's own code may be one that transformers has too.
    if kind is None or kind.__name__ == type(causal).__name__:
        return None
    return Named(_built(config, kind, causal.dtype), names)  # type: ignore[arg-type]


def build_named(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module | None:
    """The model that a folder's config.json names, parameters on the meta device; None if transformers has no such
    class. Raises LlmqError if it cannot be built."""
    config, kind = _kind(folder, trust_remote_code)
    return None if kind is None else _built(config, kind, dtype)


def build_as(folder: Path, name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder, opened by a class of transformers (an auto class too), parameters on the meta device.

    Raises LlmqError if transformers has no such class, or it does not build this model.
    """
    import transformers

    kind: Any = class_of(name)
    try:
        of: Any = getattr(kind, "config_class", None) or transformers.AutoConfig
        config = of.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not issubclass(kind, transformers.PreTrainedModel):
            found = kind._model_mapping.get(type(config), None)
            if found is None and not getattr(config, "auto_map", None):
                raise LlmqError(f"{folder}: {name} has no model of type {config.model_type!r}{_way(config)}")
            return _empty(lambda: kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code))
        if kind.__init__ is transformers.PreTrainedModel.__init__:  # what other classes are made from
            raise LlmqError(f"{folder}: --class {name} has no weights{_way(config)}")
        return _empty(lambda: kind._from_config(config, dtype=dtype))
    except LlmqError:
        raise
    except Exception as error:  # as in `_built`
        raise LlmqError(f"{folder}: --class {name} cannot build this model: {first_line(error)}") from error


def class_of(name: str) -> type:
    """A class of transformers that opens models, by its name. Raises LlmqError if there is none."""
    import transformers

    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained") or not _opens_models(kind):
        raise LlmqError(
            f"--class {name!r} is no class of transformers {transformers.__version__} that opens models: write it as "
            "AutoModel, AutoModelForSeq2SeqLM, or as config.json names it under architectures"
        )
    return kind


def _opens_models(kind: type) -> bool:
    from transformers import PreTrainedModel

    return issubclass(kind, PreTrainedModel) or hasattr(kind, "_model_mapping")


def _way(config: Any) -> str:
    """The class that would open a model instead, as the end of a sentence."""
    name = suggested(config.to_dict())
    return f": --class {name}" if name else ""


def _kind(folder: Path, trust_remote_code: bool) -> tuple[Any, type | None]:
    """A folder's config, and the first class of transformers that it names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config.json can be wrong in any way
        raise LlmqError(f"{folder}: transformers cannot read its config.json: {first_line(error)}") from error
    kinds = [getattr(transformers, str(name), None) for name in config.architectures or []]
    return config, next((k for k in kinds if isinstance(k, type) and issubclass(k, transformers.PreTrainedModel)), None)


def _built(config: Any, kind: Any, dtype: torch.dtype) -> nn.Module:
    try:
        return _empty(lambda: kind._from_config(config, dtype=dtype))
    except Exception as error:  # with a wrong config, model code may fail in any way
        raise LlmqError(f"config.json names {kind.__name__}, which cannot be built: {first_line(error)}") from error


def _empty(make: Callable[[], Any]) -> nn.Module:
    """The model that is made, without memory for its parameters."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: nn.Module = make()
    getattr(model, "tie_weights", lambda: None)()  # construction on the meta device unties parameters
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars: what it would say is what is asked."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _stem(name: str) -> str:
    """A parameter's name without what a format appends to `weight`."""
    owner, _, last = name.rpartition(".")
    return f"{owner}.weight" if last.startswith("weight") else name
