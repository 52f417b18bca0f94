"""The half of check_vllm.py that runs in vLLM's environment, without llmq.

Reads a request per line of standard input, a JSON object, and answers each with a line that begins with "RESULT ":

- {"run": FOLDER, "reference": FILE.npz, "static": bool, "dtype": NAME, "stand_in": bool, "twin": FOLDER or null,
  "picture": TEXT or null}: load the folder on the CPU, and compare log-probabilities; stand_in: where vLLM has no CPU
  kernel, a product with the dequantized weight takes its place, which shows whether vLLM's loader reads the folder
  right; picture: a text with a place for a picture, whose log-probabilities are compared with those of the twin;
- {"rules": SECTION}: the kernel that vLLM's own rules choose on NVIDIA GPUs for the first group of a
  quantization_config, for a weight of 4096 × 4096.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # 1, the default where the processor has AMX, rounds inputs to 8 bits
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
import torch
from vllm_plain import run_dense, stand_ins_for_floats, use

if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()  # vLLM 0.32 uses AMX tiles without asking the kernel for them: SIGILL in small models

SIDE = 56
"""The side of a picture, in pixels."""
GPUS = {"7.5": (7, 5), "8.0": (8, 0), "8.9": (8, 9), "9.0": (9, 0), "10.0": (10, 0)}
SIZE = 4096


class PlainProduct:
    """In the place of a kernel for packed integers: a product with the weight, dequantized after loading."""

    def __init__(self, config: Any, *names: str, **named: str) -> None:
        self.config = config

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        kind, (width, rows) = self.config.weight_type, self.config.partition_weight_shape
        bits = kind.size_bits
        codes = unpacked(layer.weight_packed, bits)[:, :width]
        scale = layer.weight_scale.float()
        # Beside fp8 inputs the codes have an offset that their type does not tell.
        zero = torch.tensor(float(1 << (bits - 1) if kind.is_signed() else kind.bias))
        if self.config.zero_points:
            zero = unpacked(layer.weight_zero_point.t().contiguous(), bits)[:, :rows].t().float()[..., None]
        grouped = codes.float().view(rows, scale.shape[1], -1)
        layer.plain = ((grouped - zero) * scale[..., None]).view(rows, width).to(layer.weight_scale.dtype)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain, bias)


class PlainFloat8(PlainProduct):
    """The same for float8 weights, which vLLM keeps as [in, out]."""

    @classmethod
    def is_supported(cls, capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.plain = (layer.weight.float().t() * layer.weight_scale.float()).to(layer.orig_dtype)


def plain_experts(method: Any, layer: torch.nn.Module) -> None:
    """In the place of packing experts for a kernel: they are dequantized, and run as unquantized ones."""
    for name in ("w13", "w2"):
        words, scale = getattr(layer, f"{name}_weight_packed"), getattr(layer, f"{name}_weight_scale")
        experts, rows, groups = scale.shape
        codes = unpacked(words.reshape(experts * rows, -1), method.num_bits).view(experts, rows, groups, -1)
        plain = (codes - (1 << (method.num_bits - 1))).float() * scale.float()[..., None]
        use(layer, name, plain.view(experts, rows, -1))
    run_dense(method, layer)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] → codes, int32 [rows, codes]: a little-endian stream of `bits` bits each."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(len(stream), -1, bits)
    return torch.from_numpy((whole.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(-1, dtype=np.int32))


def stand_ins() -> ExitStack:
    """vLLM's CPU kernels, and last the plain products, where vLLM looks for kernels."""
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as experts,
    )
    from vllm.platforms import PlatformEnum

    stack = ExitStack()
    for table, kernel in ((linear._POSSIBLE_KERNELS, PlainProduct), (linear._POSSIBLE_WFP8A16_KERNELS, PlainFloat8)):
        cpu = [*table[PlatformEnum.CPU], kernel]
        stack.enter_context(mock.patch.dict(table, {PlatformEnum.CPU: cpu}))
    backend = experts.WNA16MoEBackend.TRITON
    stack.enter_context(mock.patch.object(experts, "select_wna16_moe_backend", lambda **_: (backend, None)))
    kind = experts.CompressedTensorsWNA16MoEMethod
    stack.enter_context(mock.patch.object(kind, "process_weights_after_loading", plain_experts))
    stand_ins_for_floats(stack, PlainProduct)
    return stack


def pictures_without_operators() -> None:
    """Makes torchvision's import work beside a CPU build of torch, for which there may be no build of its operators.

    vLLM looks at model classes in a process of its own, where this would be needed, too: it looks in this one.
    """
    name = "torchvision._meta_registrations"
    sys.modules[name] = ModuleType(name)  # before vLLM imports torchvision
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda work: work()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the reference's tokens in vLLM against those of the file, and the kernels that were used.

    twin: a folder with the dequantized weights, whose log-probabilities in vLLM take the place of the file's: in a
    mixture of experts, a rounding error may send a token to another expert. With a picture, only those of the text with
    the picture: in vLLM, some towers compute something else than in transformers.
    """
    folder, static, twin, picture = (request[name] for name in ("run", "static", "twin", "picture"))
    if static:
        # The AMX kernel for int8 ignores static input scales; oneDNN's, which other processors use, does not.
        import vllm.model_executor.kernels.linear.scaled_mm.cpu as cpu_kernels

        cpu_kernels.check_cpu_sgl_kernel = lambda *_: False
    want = np.load(request["reference"])
    found, used, seen = log_probabilities(folder, want["tokens"], request["dtype"], picture)
    expected, other = want["logprob"], seen
    if twin is not None:
        expected_there, _, other = log_probabilities(twin, want["tokens"], request["dtype"], picture)
        expected = expected if picture else expected_there
    apart = np.abs(found - expected).ravel()
    told = {} if picture is None else {"picture": rms(seen[0], other[0]), "pictures_apart": rms(seen[0], seen[1])}
    return told | {
        "rms": rms(found, expected),
        # Without the 2 % of the tokens that differ most: a few that go to another expert are most of the difference.
        "rms_of_most": float(np.sqrt((np.sort(apart)[: len(apart) - len(apart) // 50] ** 2).mean())),
        "nll": float(-found.mean()),
        "expected": float(-expected.mean()),
        "floor": float(want["floor"]),
        "kernels": used,
    }


def rms(found: np.ndarray, expected: np.ndarray) -> float:
    """The root of the mean square of the difference."""
    return float(np.sqrt(((found - expected) ** 2).mean()))


def log_probabilities(
    folder: str, rows: np.ndarray, dtype: str, picture: str | None = None
) -> tuple[np.ndarray, list[str], list[np.ndarray]]:
    """Of each token but the first, in vLLM; the kernels that were used; and, with a picture's text, its tokens' with
    each of two pictures."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    length = rows.shape[1] + (16 if picture is None else 160)
    seeing = {"limit_mm_per_prompt": {"image": int(picture is not None), "video": 0}} if reads_pictures(folder) else {}
    model = None
    try:
        model = LLM(
            folder,
            dtype=dtype,
            max_model_len=length,
            enforce_eager=True,
            max_num_seqs=8,
            max_num_batched_tokens=length,
            skip_tokenizer_init=picture is None,
            enable_prefix_caching=False,
            **seeing,
        )
        prompts: list[Any] = [{"prompt_token_ids": row.tolist()} for row in rows]
        if picture is not None:
            prompts += [{"prompt": picture, "multi_modal_data": {"image": noise(seed)}} for seed in range(2)]
        done = model.generate(
            prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False
        )
        found = [
            np.array([one.prompt_logprobs[at][token].logprob for at, token in enumerate(one.prompt_token_ids) if at])
            for one in done
        ]
        return np.array(found[: len(rows)]), model.apply_model(kernels)[0], found[len(rows) :]
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


def reads_pictures(folder: str) -> bool:
    """Whether a folder's model has a part for pictures, which vLLM does not build where 0 is their largest number."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return "vision_config" in json.load(file)


def noise(seed: int) -> Any:
    """A picture of random pixels."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


def kernels(model: torch.nn.Module) -> list[str]:
    """The kernels of the quantized layers."""
    found = set()
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            parts = (getattr(scheme, name, None) for name in ("kernel", "fp8_linear", "linear_kernel"))
            found.add(next((short(type(part)) for part in parts if part is not None), type(scheme).__name__))
    return sorted(found)


def short(kernel: type) -> str:
    """A kernel's name without what all of them have."""
    return kernel.__name__.removesuffix("Kernel").removesuffix("Linear").removesuffix("ScaledMM")


def rules(section: dict[str, Any]) -> dict[str, Any]:
    """GPU's compute capability → the kernel that would run there; or why vLLM refuses the scheme."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    try:
        kind = get_quantization_config(section["quant_method"])
        config = kind.from_config(section)
    except Exception as error:  # what vLLM says is the result
        return {"refused": first_line(error)}
    chosen, reasons = {}, []
    for name, capability in GPUS.items():
        try:
            with nvidia(capability):
                chosen[name] = kernel_for(config, section, capability)
        except Exception as error:
            reasons.append(first_line(error))
    return chosen or {"refused": reasons[0]}


def nvidia(capability: tuple[int, int]) -> ExitStack:
    """Everything that vLLM asks of its platform answers as an NVIDIA GPU of a compute capability."""
    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.kernels.linear.mixed_precision.humming as mixed
    import vllm.model_executor.kernels.linear.scaled_mm.humming as scaled
    import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a8_fp8 as w4a8
    import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 as w8a8
    import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a16_fp8 as w8a16
    import vllm.model_executor.layers.quantization.utils.nvfp4_utils as fp4
    from vllm import _custom_ops as ops
    from vllm.distributed import parallel_state
    from vllm.platforms import PlatformEnum, current_platform
    from vllm.platforms.interface import DeviceCapability

    kind, number = type(current_platform), capability[0] * 10 + capability[1]

    def as_number(value: Any) -> int:
        return int(value) if isinstance(value, int) else int(value[0] * 10 + value[1])

    answers = {
        "_enum": PlatformEnum.CUDA,
        "is_cuda": lambda self: True,
        "is_cuda_alike": lambda self: True,
        "is_cpu": lambda self: False,
        "get_device_capability": classmethod(lambda cls, device_id=0: DeviceCapability(*capability)),
        "is_device_capability": classmethod(lambda cls, value, device_id=0: as_number(value) == number),
        "has_device_capability": classmethod(lambda cls, value, device_id=0: as_number(value) <= number),
    }
    stack = ExitStack()
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(kind, name, answer))
    for module in (mixed, scaled):
        stack.enter_context(mock.patch.object(module, "has_humming", lambda: True))
    settings = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16 if number >= 80 else torch.float16))
    for module in (w8a8, w8a16):
        stack.enter_context(mock.patch.object(module, "get_current_vllm_config", lambda: settings))
    alone = SimpleNamespace(world_size=1, rank_in_group=0)
    stack.enter_context(mock.patch.object(parallel_state, "get_tp_group", lambda: alone))
    choose = linear.choose_scaled_mm_linear_kernel

    def stop(*args: Any, **named: Any) -> None:
        raise ChosenKernel(choose(*args, **named))

    stack.enter_context(mock.patch.object(linear, "choose_scaled_mm_linear_kernel", stop))
    choose_mixed = w4a8.choose_mp_linear_kernel

    def stop_mixed(*args: Any, **named: Any) -> None:
        raise ChosenKernel(choose_mixed(*args, **named))

    stack.enter_context(mock.patch.object(w4a8, "choose_mp_linear_kernel", stop_mixed))
    # Of a CUDA build this is known only to its binary: CUTLASS has fp8 from Ada on, and fp4 from Blackwell on.
    stack.enter_context(mock.patch.object(ops, "cutlass_scaled_mm_supports_fp8", lambda number: number >= 89))
    stack.enter_context(mock.patch.object(fp4, "cutlass_scaled_mm_supports_fp4", lambda number: number >= 100))
    return stack


def kernel_for(config: Any, section: dict[str, Any], capability: tuple[int, int]) -> str:
    """The kernel of the section's first group, chosen by the scheme's own code."""
    target = next(iter(config.target_scheme_map.values()))
    scheme = config._get_scheme_from_parts(
        target["weights"], target["input_activations"], format=target["format"], layer_name="model.layers.0.linear"
    )
    if scheme.get_min_capability() > capability[0] * 10 + capability[1]:
        raise ValueError(f"{type(scheme).__name__} needs compute capability {scheme.get_min_capability() / 10}")
    try:
        with torch.device("meta"):
            scheme.create_weights(
                layer=torch.nn.Module(),
                input_size=SIZE,
                output_size=SIZE,
                output_partition_sizes=[SIZE],
                input_size_per_partition=SIZE,
                params_dtype=torch.bfloat16 if capability >= (8, 0) else torch.float16,
                weight_loader=lambda *_: None,
            )
    except ChosenKernel as chosen:
        return short(chosen.kernel)
    return short(type(scheme.kernel))


class ChosenKernel(Exception):
    """Carries a kernel out of vLLM's code before that makes it, for which a GPU would be needed."""

    def __init__(self, kernel: type) -> None:
        super().__init__(kernel.__name__)
        self.kernel = kernel


def first_line(error: BaseException) -> str:
    """An exception in one line: the innermost that says something, without addresses and what is the same for all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:  # an assertion without words
        lines = [str(traceback.extract_tb(error.__traceback__)[-1].line)]
    words = " ".join(lines[:3]).partition(" Must be one of")[0].partition("Value error, ")
    return f"{type(error).__name__}: {words[2] or words[0]}"[:400]


def versions() -> dict[str, str]:
    """The versions of what the results depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "compressed-tensors")}


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not come between
    if importlib.util.find_spec("torchvision") is not None:
        pictures_without_operators()
    print("RESULT " + json.dumps(versions()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "rules" in request:
                answer = rules(request["rules"])
            else:
                with stand_ins() if request["stand_in"] else ExitStack():
                    answer = run(request)
        except BaseException as error:  # the answer is what vLLM says
            traceback.print_exc()
            answer = {"refused": first_line(error)}
        print("RESULT " + json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
