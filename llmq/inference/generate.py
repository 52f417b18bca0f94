"""A quick look at what a model generates: continues a prompt, printing tokens as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.inference.pretrained import load_model, load_tokenizer


def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = True,
    trust_remote_code: bool = False,
) -> str:
    """The prompt's continuation by the model in `folder`, loaded through `from_pretrained`.

    temperature: 0 is greedy decoding; above 0, tokens are sampled with `seed`. stream: print prompt and continuation to
    stdout. Raises LlmqError if the model does not load or the prompt is empty.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    folder = Path(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise LlmqError("the prompt is empty: give some text to continue")
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=stream)
    torch.manual_seed(seed)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    ids = inputs["input_ids"].to(device)
    with torch.inference_mode():
        out = model.generate(ids, generation_config=config, streamer=streamer, **_rest(inputs, ids, device))
    text: str = tokenizer.decode(out[0, ids.shape[-1] :], skip_special_tokens=True)
    return text


def _rest(inputs: Any, ids: Any, device: str) -> dict[str, Any]:
    """The tokenizer's other outputs of the same length as the ids (the attention mask)."""
    return {
        name: value.to(device) for name, value in inputs.items() if name != "input_ids" and value.shape == ids.shape
    }
