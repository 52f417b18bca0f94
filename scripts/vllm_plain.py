"""What takes the place of the kernels for floats of 4 and 8 bits that vLLM's CPU build does not have (vllm_worker.py).

vLLM's own loader fills its parameters; after that the weights are made dense by the formats' definitions. Inputs are
not rounded. Runs in vLLM's environment, without llmq.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat((VALUES, -VALUES))
"""The numbers of FP4's codes."""
BLOCK = 128


def dense(codes: torch.Tensor, scale: torch.Tensor, divisor: torch.Tensor | float = 1.0) -> torch.Tensor:
    """A weight [..., out, in], float32.

    codes: float8, or two FP4 codes in a byte; scale: exponents + 127, or floats, of groups of inputs, or of blocks;
    divisor: of the scales, broadcast to [..., out, groups].
    """
    numbers = codes.float()
    if codes.dtype == torch.uint8:
        numbers = VALUES[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
    factors = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    rows, width = numbers.shape[-2:]
    if factors.shape[-2] != rows:
        factors = factors.repeat_interleave(BLOCK, -2)[..., :rows, :]
    factors = factors / divisor
    return numbers * factors.repeat_interleave(width // factors.shape[-1], -1)


class PlainFloats:
    """A kernel: a product with the dense weight."""

    def __init__(self, *config: Any, **named: Any) -> None:
        pass

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def input_quant_key(self) -> None:
        return None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        second = getattr(layer, "weight_global_scale", None)  # vLLM has made it a factor
        layer.plain = dense(layer.weight, layer.weight_scale, 1.0 if second is None else 1 / second)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)


def plain_experts(method: Any, layer: torch.nn.Module) -> None:
    """In the place of packing experts for a kernel: they are made dense."""
    for name in ("w13", "w2"):
        packed = getattr(layer, f"{name}_weight_packed", None)
        codes = getattr(layer, f"{name}_weight") if packed is None else packed
        second = getattr(layer, f"{name}_weight_global_scale", None)
        divisor: torch.Tensor | float = 1.0
        if second is not None:  # of each expert, or of each of its two parts
            parts = second.reshape(len(second), -1)
            divisor = parts.repeat_interleave(codes.shape[1] // parts.shape[1], 1).unsqueeze(-1)
        use(layer, name, dense(codes, getattr(layer, f"{name}_weight_scale"), divisor))
    run_dense(method, layer)


def use(layer: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """Put a stack of dense experts in the place of the packed one."""
    found = torch.nn.Parameter(weight.to(layer.params_dtype), requires_grad=False)
    layer._parameters.pop(f"{name}_weight", None)
    layer.register_parameter(f"{name}_weight", found)


def run_dense(method: Any, layer: torch.nn.Module) -> None:
    """Run dense experts as those of an unquantized model."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    plain_method = UnquantizedFusedMoEMethod(method.moe)
    layer._replace_quant_method(plain_method)
    plain_method.process_weights_after_loading(layer)


def stand_ins_for_floats(stack: ExitStack, integers: type) -> None:
    """Put the kernel, and what makes experts dense, where vLLM looks for its own. integers: a kernel for those."""
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe as experts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4,
        compressed_tensors_w4a8_fp8,
    )
    from vllm.platforms import PlatformEnum

    for name in ("MXFP8", "MXFP4", "FP8_BLOCK"):
        table = getattr(linear, f"_POSSIBLE_{name}_KERNELS")
        there = [*table.get(PlatformEnum.CPU, ()), PlainFloats]
        stack.enter_context(mock.patch.dict(table, {PlatformEnum.CPU: there}))
    # With 16-bit inputs one kernel is forced.
    stack.enter_context(mock.patch.object(compressed_tensors_w4a4_nvfp4, "init_nvfp4_linear_kernel", PlainFloats))
    # Only Hopper has 4-bit integers beside fp8; vLLM's CPU kernel would take them, and fail.
    stack.enter_context(mock.patch.object(compressed_tensors_w4a8_fp8, "choose_mp_linear_kernel", lambda _: integers))
    known = CompressedTensorsConfig._is_fp8_w4a8
    stack.enter_context(mock.patch.object(CompressedTensorsConfig, "_is_fp8_w4a8_sm90", staticmethod(known)))
    methods = {
        "w4a4_nvfp4": ("select_nvfp4_moe_backend", "CompressedTensorsW4A4Nvfp4MoEMethod"),
        "w4a4_mxfp4": ("select_mxfp4_moe_backend", "CompressedTensorsW4A4Mxfp4MoEMethod"),
        "w8a8_mxfp8": ("select_mxfp8_moe_backend", "CompressedTensorsW8A8Mxfp8MoEMethod"),
        "w8a8_fp8": ("select_fp8_moe_backend", "CompressedTensorsW8A8Fp8MoEMethod"),
    }
    for name, (select, kind) in methods.items():
        module = __import__(f"{experts.__name__}.compressed_tensors_moe_{name}", fromlist=[kind])
        stack.enter_context(mock.patch.object(module, select, lambda *_, **__: (None, None)))
        stack.enter_context(mock.patch.object(getattr(module, kind), "process_weights_after_loading", plain_experts))
