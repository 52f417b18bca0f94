"""Load a model folder, always through `from_pretrained`; errors that stock transformers only warns about are raised.

Transformers loads a checkpoint whose quantization it does not know, or whose tensors do not fit, with a warning and
random weights. Measurements on such a model are meaningless, so here both are errors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmq import formats
from llmq.checkpoint.strangers import of_folder, of_tokenizer
from llmq.discovery.architecture import generates as can_generate
from llmq.discovery.architecture import generator, not_causal, opener
from llmq.errors import LlmqError, first_line
from llmq.formats.served import unguarded
from llmq.formats.stacks import unmarked
from llmq.inference.dense import dense_source, load_dense

OTHERS = {"hqq": "hqq", "torchao": "torchao", "quanto": "optimum.quanto"}
"""Formats that only stock transformers reads: method in config.json → the package that is needed."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SCALES = (".weight_scale", ".weight_scale_inv")

# Loading changes state of the whole process: standard error, llmq's log and transformers' tables of readers.
_one_at_a_time = threading.RLock()


def load(
    model: str | Path,
    *,
    device_map: Any = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    codebooks: str = "exact",
) -> Any:
    """Load a model folder or hub id on llmq's kernels, in evaluation mode; unquantized weights are loaded as they are.

    device_map: as from_pretrained takes it: 'auto', 'cpu', 'cuda' …; dtype: auto (the checkpoint's own), float32,
    bfloat16 or float16. codebooks: 'int8' makes weights of 4-bit codebooks (NF4, FP4, kmeans) 8-bit integers where a
    CPU runs them in bfloat16: faster for one token at a time, at twice the memory, with weights off by about .5 %. No
    global state is changed. Raises LlmqError if the folder is not a model, or its tensors and its config.json
    contradict each other.
    """
    from llmq.checkpoint.hub import resolve
    from llmq.inference.rounded import round_codebooks

    if codebooks not in ("exact", "int8"):
        raise LlmqError(f"codebooks must be exact or int8, not {codebooks!r}")
    folder = resolve(str(model), trust_remote_code=trust_remote_code)
    found = load_model(
        folder,
        dtype=dtype,
        device=device_map,
        trust_remote_code=trust_remote_code,
        probe=False,
        kernels=True,
        generates=False,
    )
    if codebooks == "int8":
        round_codebooks(found)
    return found


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    device: Any = "cpu",
    trust_remote_code: bool = False,
    progress: bool = False,
    quantization: Any = None,
    probe: bool = True,
    kernels: bool = False,
    generates: bool = True,
    dense: bool = False,
) -> Any:
    """The model in evaluation mode on `device`, ready to run: weights that a format unpacks at the first forward are
    unpacked.

    dtype: float32, bfloat16, float16, or auto (the checkpoint's own). progress: show the current stage on stderr.
    quantization: transformers' own config, to quantize an unquantized folder, or one that llmq dequantizes, while it is
    loaded. probe: run one token; otherwise, errors that only occur in a forward pass are not found, and nothing is
    unpacked (or repacked) for inference. kernels: run formats that llmq reads packed, on its own operators. dense: FP8
    and FP4 are dequantized, also where stock transformers would run them. device may be a device map too; with 'auto',
    parts that fit neither the GPUs nor the memory stay on disk and are read in every forward pass. generates: open the
    part that generates text; otherwise all of the model is opened, by the class that config.json names.

    Raises LlmqError if the folder is not a model, a package that its format needs is not installed, its quantization is
    unknown to transformers, or tensors are missing or have wrong shapes.
    """
    options = (dtype, device, trust_remote_code, progress, quantization, probe, kernels, dense)
    try:
        return _load(folder, generates, *options)
    except LlmqError:
        # The causal class may be the half of a model whose checkpoint only the whole finds its weights in.
        if not (generates and _has_whole(folder, trust_remote_code)):
            raise
        with contextlib.suppress(LlmqError):
            return _load(folder, False, *options)
        raise


def _has_whole(folder: Path, trust_remote_code: bool) -> bool:
    """Whether config.json names a class that generates text, beside the causal one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # a config.json can be wrong in any way
        return False
    named, causal = opener(config), generator(config)
    return named is not causal and can_generate(named) and named not in causal._model_mapping.values()


def _load(
    folder: Path,
    generates: bool,
    dtype: str,
    device: Any,
    trust_remote_code: bool,
    progress: bool,
    quantization: Any,
    probe: bool,
    kernels: bool,
    dense: bool,
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    config = check_readable(folder, kernels)
    other = not_causal(config) if generates else None
    if dtype != "auto" and dtype not in DTYPES:
        raise LlmqError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    kind = dtype if dtype == "auto" else DTYPES[dtype]
    opens = generator if generates else opener
    # Offload folder for tensors that transformers computes while loading and that do not fit in memory.
    disk = device == "auto" or (isinstance(device, dict) and "disk" in device.values())
    spilled = tempfile.TemporaryDirectory(prefix="llmq-offload-") if disk else None
    try:
        with _one_at_a_time, _status(f"loading {folder}", progress), _readers(kernels):
            few = dense_source(folder, trust_remote_code, always=dense, kernels=kernels, kind=kind)
            loaded: Any = (
                load_dense(few, kind, device, generates, None if spilled is None else spilled.name, quantization)
                if few is not None
                else opens(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)).from_pretrained(
                    folder,
                    dtype=kind,
                    device_map=device,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    local_files_only=True,
                    **({} if quantization is None else {"quantization_config": quantization}),
                    **({} if spilled is None else {"offload_folder": spilled.name}),
                )
            )
            loaded[0].eval()
            if dtype == "float32" and quantization is None:
                widen(loaded[0])
            if probe:
                with torch.inference_mode():
                    where = loaded[0].device
                    where = input_device("auto") if where.type == "meta" else where
                    loaded[0](input_ids=torch.zeros(1, 1, dtype=torch.int64, device=where), use_cache=False)
    except LlmqError as error:
        if spilled is not None:
            spilled.cleanup()
        # Readers that transformers calls know a configuration, and not its folder.
        if str(folder) in str(error):
            raise
        raise LlmqError(f"{folder}: {error}") from error
    except (
        OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, AssertionError,
        SafetensorError, re.error,
    ) as error:  # fmt: skip
        if spilled is not None:
            spilled.cleanup()
        if isinstance(error, re.error) or hasattr(error, "errors"):
            told = first_line(error)
            if isinstance(error, re.error):
                told = f"{error.pattern!r} is no regular expression: {error.msg}"
            raise LlmqError(
                f"{folder / 'config.json'}: the quantization section cannot be read: {told}: download config.json "
                "again, or start from the unquantized model"
            ) from error
        raise LlmqError(f"{folder} cannot be loaded: {other or first_line(error)}") from error
    model, info = loaded
    if spilled is not None:
        weakref.finalize(model, spilled.cleanup)
    missing = sorted(info["missing_keys"])
    if missing and other:
        raise LlmqError(f"{folder} lacks {missing[0]}: {other}")
    if missing:
        raise LlmqError(
            f"{folder} lacks {len(missing)} tensors that its architecture needs, such as {missing[0]}: "
            "transformers would fill them with random numbers; download or write the checkpoint again"
        )
    # A module that is not loaded at all, such as a head for more tokens, has its weight left over too.
    left = {str(key) for key in info["unexpected_keys"]}
    used = {name for name, _ in model.named_parameters()} - left
    scales = [name for name in sorted(left) if name.endswith(SCALES) and f"{name.rpartition('.')[0]}.weight" in used]
    if scales:
        raise LlmqError(
            f"{folder}: {scales[0]} is stored, and transformers would take its weight without it, because config.json "
            "does not say that it is quantized: download config.json again, or start from the unquantized model"
        )
    misshapen = sorted(str(key[0]) for key in info["mismatched_keys"])
    if misshapen:
        raise LlmqError(
            f"{folder}: {misshapen[0]} has a different shape than config.json says; write the checkpoint again"
        )
    return model


def widen(model: Any) -> None:
    """Make a model that is loaded in float32 compute in float32.

    The reader of a bitsandbytes checkpoint leaves unquantized tensors, and the compute dtype of its layers, as they are
    in the checkpoint.
    """
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for module in model.modules():
        if getattr(module, "compute_dtype", None) in (torch.bfloat16, torch.float16):
            module.compute_dtype = torch.float32


def input_device(device: str) -> str:
    """The device for the inputs of a model loaded on `device`: for 'auto', the first GPU, or the CPU."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _readers(kernels: bool) -> contextlib.AbstractContextManager[None]:
    """Use llmq's own readers of quantized checkpoints within the context."""
    if not kernels:
        return contextlib.nullcontext()
    from llmq.inference.transformers_hook import reading

    return reading()


@contextlib.contextmanager
def _status(text: str, shown: bool) -> Iterator[None]:
    """One line with a spinner instead of the five progress bars that transformers draws."""
    from rich.console import Console

    console = Console(file=sys.stderr if shown else io.StringIO())
    said = _Held()
    try:
        with console.status(text), contextlib.redirect_stderr(io.StringIO()), said:
            yield
    finally:
        said.say()


class _Held(logging.Handler):
    """Collects llmq's log records while standard error is redirected."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.logger = logging.getLogger("llmq")

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps it."""
        self.records.append(record)

    def __enter__(self) -> None:
        self.before, self.logger.propagate = self.logger.propagate, False
        self.others, self.logger.handlers = self.logger.handlers, [self]

    def __exit__(self, *_: object) -> None:
        self.logger.propagate, self.logger.handlers = self.before, self.others

    def say(self) -> None:
        """Says it."""
        for record in self.records:
            self.logger.handle(record)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's own tokenizer. Raises LlmqError if it has none, or it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise LlmqError(of_tokenizer(folder, error)) from error


def check_readable(folder: Path, kernels: bool = False) -> dict[str, Any]:
    """config.json, after checking that the folder's quantization can be read. Raises LlmqError.

    kernels: with llmq's own readers, which need no other package, or with transformers' if those refuse. What llmq
    dequantizes itself needs no package either.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        told = (of_folder(folder) if folder.is_dir() else None) or "has no config.json: give the folder of a model"
        raise LlmqError(f"{folder} {told}") from error
    except (OSError, ValueError) as error:
        raise LlmqError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return config
    method = formats.method_of(quantization) or ""
    dense = not formats.read_by_stock(method, unguarded(quantization))
    ours = (kernels and method in formats.readers()) or dense
    if not _known(method) and not ours:
        way = (
            "--kernels or llmq.load reads it" if method in formats.readers() else "load it with the tool that wrote it"
        )
        raise LlmqError(
            f"{folder} is quantized with {method!r}, which transformers would load as random weights: {way}"
        )
    if not dense and unguarded(quantization) is not quantization:
        raise LlmqError(
            f"{folder} has experts that transformers would read wrong, beside weights that llmq does not make dense: "
            "only vLLM reads it"
        )
    if not kernels and not dense and unmarked(quantization)[1]:
        raise LlmqError(f"{folder} is stored in a form that only llmq reads: add --kernels, or use llmq.load")
    package = (OTHERS | formats.packages()).get(method)
    if package and not kernels and not dense and not _installed(package):
        other = "; `llmq eval --kernels` needs no other package" if method in formats.readers() else ""
        raise LlmqError(
            f"{folder} is quantized with {method}: pip install {package.replace('_', '-').replace('.', '-')}{other}"
        )
    return config


def _known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return method in AUTO_QUANTIZER_MAPPING or f"{method}_4bit" in AUTO_QUANTIZER_MAPPING


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
