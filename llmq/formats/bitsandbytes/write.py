"""bitsandbytes NF4, which transformers and PEFT (QLoRA) load with bitsandbytes installed.

`spec` lists the tensors of a weight [out, in]; names and bytes are exactly those that transformers 5.23 and
bitsandbytes 0.50 write. Found in their code and tried with both:

- The block size must divide the inputs. Otherwise their AVX-512 CPU kernel silently uses the magnitude of the wrong
  block (weights off by 40 %). Their GPU kernels would read such weights.
- On CPUs with avx512_bf16, evaluation runs in bfloat16 with bfloat16 magnitudes whatever the model's dtype, and fails
  on a weight whose number of outputs is not a multiple of 32.
- `llm_int8_skip_modules` is matched as a prefix of a name, as a regular expression or as a suffix. If it is given, the
  output layer is no longer skipped by default, so it is always listed. Only modules of exactly the class Linear are
  replaced.
- A checkpoint has one scheme: the configuration has one `bnb_4bit_use_double_quant` for all.
- vLLM 0.32 has no bitsandbytes of its own; with vllm-bnb-plugin 0.0.3 it loads a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.nf4 import NESTED_BLOCK, Nested, NF4Weight, group_of
from llmq.grids.scheme import Scheme

QUANT_METHOD = "bitsandbytes"
PACKED, ABSMAX, LEVELS = "weight", "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_LEVELS = "weight.nested_absmax", "weight.nested_quant_map"
STATE = "weight.quant_state.bitsandbytes__nf4"
SUFFIXES = (PACKED, ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_LEVELS, STATE)
# The maximum number of characters of a float32's exact value in JSON.
LONGEST_FLOAT = 22


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that store a weight [out, in]: suffix → (dtype, shape); scale_dtype: of the dequantized weight.

    With double quantization the state's size is an upper bound: the number of digits of the offset depends on the
    weight. Raises LlmqError if the block size does not divide `in`.
    """
    rows, width = shape
    block = group_of(scheme)
    if width == 0 or width % block:
        raise LlmqError(f"group size {block} does not divide the {width} inputs of the weight")
    blocks = rows * width // block
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        PACKED: (torch.uint8, (rows * width // 2, 1)),
        ABSMAX: (torch.uint8 if scheme.double_quant else torch.float32, (blocks,)),
        LEVELS: (torch.float32, (16,)),
    }
    state = _state((rows, width), scheme, scale_dtype, 0.0 if scheme.double_quant else None)
    size = len(state)
    if scheme.double_quant:
        entries[NESTED_ABSMAX] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        entries[NESTED_LEVELS] = (torch.float32, (256,))
        size += LONGEST_FLOAT - len("0.0")
    return entries | {STATE: (torch.uint8, (size,))}


def pack(q: NF4Weight) -> dict[str, Tensor]:
    """The tensors to store, by suffix, as `spec` says."""
    # In memory all weights share the two tables of levels; stored tensors must not share memory.
    tensors = {PACKED: q.packed, ABSMAX: q.absmax, LEVELS: q.codebook.clone()}
    if q.nested is not None:
        tensors |= {NESTED_ABSMAX: q.nested.absmax, NESTED_LEVELS: q.nested.codebook.clone()}
    state = _state(q.shape, q.scheme, q.dtype, None if q.nested is None else q.nested.offset)
    return tensors | {STATE: torch.frombuffer(bytearray(state), dtype=torch.uint8).to(q.packed.device)}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> NF4Weight:
    """The inverse of `pack`. Raises LlmqError if tensors are missing or their dtypes or shapes differ from `spec`."""
    wanted = [s for s in SUFFIXES if scheme.double_quant or s not in (NESTED_ABSMAX, NESTED_LEVELS)]
    missing = [s for s in wanted if s not in tensors]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    state = json.loads(bytes(tensors[STATE].tolist()))
    rows, width = state["shape"]
    dtype: torch.dtype = getattr(torch, state["dtype"])
    if (state["quant_type"], state["blocksize"]) != ("nf4", group_of(scheme)):
        raise LlmqError(f"{STATE} says {state['quant_type']} in blocks of {state['blocksize']}, not {scheme}")
    for suffix, (kind, shape) in spec((rows, width), scheme, dtype).items():
        found = tensors[suffix]
        if suffix != STATE and (found.dtype != kind or tuple(found.shape) != shape):
            raise LlmqError(
                f"{suffix} of a {scheme} weight [{rows}, {width}] must be {kind} {[*shape]}, "
                f"not {found.dtype} {[*found.shape]}"
            )
    nested = None
    if scheme.double_quant:
        nested = Nested(tensors[NESTED_ABSMAX], tensors[NESTED_LEVELS], state["nested_offset"])
    return NF4Weight(tensors[PACKED], tensors[ABSMAX], tensors[LEVELS], (rows, width), dtype, scheme, nested)


def refusal(scheme: Scheme) -> str | None:
    """Why stock readers cannot load this scheme, in a sentence, or None."""
    return None if scheme.rules.format == "bitsandbytes" else f"bitsandbytes stores 4-bit nf4 weights, not {scheme}"


def config(
    groups: Mapping[Scheme, Sequence[str]], ignore: Iterable[str], compute_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, key for key what transformers' BitsAndBytesConfig writes.

    groups: the module names of the single scheme; ignore: the names of unquantized linear modules. Names as in the
    checkpoint, without '.weight'; compute_dtype: the dtype of every product, preferably the model's own. Raises
    LlmqError if nothing is quantized, if there is more than one scheme, or if a name in `ignore` makes transformers
    skip a quantized module too.
    """
    schemes = [scheme for scheme, names in groups.items() if names]
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    if len(schemes) > 1:
        raise LlmqError(f"bitsandbytes holds one scheme in a checkpoint, not {' and '.join(map(str, schemes))}")
    skipped = sorted(set(ignore))
    # Matched as transformers does: as a prefix, as a regular expression, and as a suffix.
    for key in skipped:
        start = re.compile(rf"(?:{key})(?:(?<=\.)|(?=\.|$))")
        for name in groups[schemes[0]]:
            if start.match(name) or name.endswith(key):
                raise LlmqError(
                    f"transformers would also skip {name} if {key} is not quantized: --keep both, or quantize both"
                )
    return {
        "quant_method": QUANT_METHOD,
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": schemes[0].double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


def _state(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, offset: float | None) -> bytes:
    """The JSON that bitsandbytes' QuantState writes beside a weight; offset: of double-quantized magnitudes."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": group_of(scheme),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [*shape],
    }
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()
