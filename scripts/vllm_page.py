"""docs/vllm.md, from the rows of check_vllm.py."""

from __future__ import annotations

from typing import Any

from vllm_cases import Case

HEAD = """# vLLM

What vLLM {vllm} does with the folders that llmq writes. This page and `llmq/formats/vllm.json`, from which `llmq plan`,
reports and model cards take what they say of vLLM, are written by `scripts/check_vllm.py`; last run {date}, with
{versions}.

**CPU**: the folder was loaded and run in float16 (gemma3: bfloat16). The number is the rms difference of
log-probabilities to the run's dequantized weights in float32 in plain transformers: at most 0.003, or, where inputs are
rounded too or vLLM refuses float16, 1.5 times what the dtype alone changes there (in brackets). "plain": vLLM has no
CPU kernel for the scheme; a product with the dequantized weight took its place, so that vLLM's own loader was tried,
but no kernel.
**CUDA**: the kernel that vLLM's own rules choose for a weight of 4096 × 4096, by compute capability, with the platform
mocked and Humming counted as installed. Nothing was run on a GPU. int8 with static scales: by oneDNN's kernel; vLLM's
AMX kernel ignores static scales.

**Floats of 4 and 8 bits**: the CPU build has no kernel for them (for blocks of fp8 only on processors with AMX, on
which this was not run). With the plain product, which leaves inputs alone, vLLM's own loader filled its parameters from
the folder, with the scales' names, shapes and dtypes as written; so it did for 4-bit integers beside fp8 inputs, a
scheme of Hopper's only. FlashInfer counts as not installed: where it is, vLLM prefers its kernels on Blackwell. To
vLLM, mxfp4 and mxfp8 are schemes with rounded inputs: where such a kernel is chosen, it rounds the inputs of
weight-only folders, too (from its source). fp8-block without rounded inputs fails in vLLM's own code, whatever the GPU.
Experts: 4-bit integers beside fp8 inputs need widths that 256 divides (from its source).

Weights whose scales are for blocks of 128 outputs (fp8-block): vLLM refuses a fused matrix if a part other than the
last has outputs that are no whole blocks, and experts whose matrices have. `llmq plan` warns of it, and refuses it with
`--loader vllm`. Folders of llmq's own (kmeans) and of AQLM (vq) are refused aloud.

NF4 needs a plugin in vLLM {vllm}: with `vllm-bnb-plugin` 0.0.3 a folder was loaded by hand (rms 0.0127 in bfloat16,
whose own floor is 0.0125).

## Schemes, on demo

| scheme | CPU | CUDA |
|---|---|---|
"""
OTHERS = """
## Other models, methods and mixtures

| model | recipe | CPU |
|---|---|---|
"""
PICTURES = """
## Vision-language models

Small random models, with a processor; quantized on text, towers and projectors left alone. "Text" is the same as above.
"Picture" is the rms difference of the log-probabilities of a text with a picture to those of the dequantized weights,
in vLLM both: some towers compute something else there than in transformers, quantized or not. Another picture changed
them by 0.09 at least. "Names of transformers 5": vLLM does not know its names for a CLIP or SigLIP tower, and refuses
the unquantized folder as well; text alone (`limit_mm_per_prompt={"image": 0, "video": 0}`) runs.
Where inputs are rounded, the picture's number is that of the rounding: the dequantized weights are run without.

Loaded by hand, but not run (2026-11-28, 4-bit g32, tiny checkpoints): 30 types that vLLM loads unquantized, among them
all of the above, gemma4, glm4v, paligemma, qwen3_5, qwen3_5_moe, and qwen2_audio, granite_speech,
moss_transcribe_diarize for sounds. All load, every layer of a decoder quantized, none of a tower, and no parameter is
left unfilled. 13 more types are in vLLM, but it loads their tiny checkpoints in no form.

| model | recipe | text | picture |
|---|---|---|---|
"""
KEYS = """
## Keys and values

`--kv-cache fp8`, by hand, once (2026-11-29, AMD EPYC without AMX): books8m in 4 bits and tiny qwen3, gemma3, phi3,
gpt_neox and olmo2 load, `kv_cache_dtype` is fp8 without an option, and every layer has the stored scales. On books8m,
float16, four rows of 256 random tokens, the log-probabilities are 0.0096 (rms) from a simulated cache with the stored
scales that rounds *towards zero*, and 0.110 from one that rounds to nearest, as the scales are meant for; that
changes them by 0.035. vLLM's CPU kernel does the same to the unquantized model with scales of 1 (0.0099 and 0.108),
so on a CPU an fp8 cache costs about three times what it should (0.103 from an unrounded cache). It needs AVX-512 or
AMX there, and heads of a multiple of 32 numbers. `fp8-head` loads there with a scale for each head, and gives the
very log-probabilities of `fp8`: the CPU kernel takes the largest. On GPUs, from vLLM's source, only the
FlashAttention backend takes scales of heads, from its version 3 on.
"""
FUSED = """
## Weights that vLLM fuses

vLLM makes one matrix of q, k and v, and one of gate and up. `scripts/check_vllm.py --fused` plans every combination
of 4 and 8 bits, symmetric or not, and kept, of q, k, v (125) and of gate, up (25): `llmq plan` refuses all but the ten
where the parts have one scheme, and these ten give the right log-probabilities. A sample of the refused ones, written
with `--loader transformers`, was loaded too: vLLM fails, or loads them wrong. See design.md, "Fused weights".
"""


def page(rows: list[tuple[Case, dict[str, Any]]], data: dict[str, Any]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data["versions"].items()))
    text = HEAD.format(vllm=data["vllm"], date=data["date"], versions=versions)
    for case, row in rows:
        if case.table:
            text += f"| {case.name} | {_cpu(row['cpu'])} | {_cuda(row['cuda'])} |\n"
    text += OTHERS
    for case, row in rows:
        if not case.table and not case.reads_pictures:
            text += f"| {case.model} | {case.name} | {_cpu(row['cpu'])} |\n"
    return text + pictures(rows) + KEYS + FUSED


def pictures(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """The section of the models that read pictures."""
    text = PICTURES
    for case, row in rows:
        if case.reads_pictures:
            cpu = row["cpu"]
            found = cpu if "rms" in cpu else cpu.get("stand_in", {})
            seen = f"{found['picture']:.4f}" if "picture" in found else ""
            text += f"| {case.model} | {case.name} | {_cpu(cpu)} | {seen} |\n"
    return text


def merged(old: str, rows: list[tuple[Case, dict[str, Any]]], data: dict[str, Any]) -> str:
    """A page of earlier rows with these rows in their places, or at the end of their tables."""
    new = page(rows, data)
    titles = ["## Schemes, on demo", *(part.strip().partition("\n")[0] for part in (OTHERS, PICTURES, KEYS, FUSED))]
    text = new.partition(titles[0])[0]
    for title, after in zip(titles, [*titles[1:], ""], strict=True):
        mine, known = (_section(whole, title, after) for whole in (new, old))
        named = 1 if title == titles[0] else 2
        found = {_key(line, named): line for line in known if line.startswith("|")}
        found |= {_key(line, named): line for line in mine if line.startswith("|")}
        # The words are those of now.
        begin = next((at for at, line in enumerate(mine) if line.startswith("|")), len(mine))
        text += "\n".join([title, *mine[:begin], *found.values()])
        text += "\n\n" if after else "\n"
    return text


def _section(text: str, title: str, after: str) -> list[str]:
    """The lines of a section, without its title and what is blank at its end."""
    inside = text.partition(f"{title}\n")[2]
    return (inside.partition(f"\n{after}\n")[0] if after else inside).rstrip().split("\n")


def _key(line: str, named: int) -> tuple[str, ...]:
    """What a line of a table is of: a scheme, or a model and a recipe, its first cells."""
    return tuple(cell.strip() for cell in line.strip("|").split("|")[:named])


def _cpu(cpu: dict[str, Any]) -> str:
    if "rms" in cpu:
        floor = f" ({cpu['floor']:.4f})" if cpu["floor"] else ""
        return f"{cpu['rms']:.4f}{floor}, {', '.join(cpu['kernels'])}"
    instead = cpu.get("stand_in", {})
    if "rms" in instead:
        most = instead.get("rms_of_most", instead["rms"])
        few = f" ({most:.4f} without the 2 % of the tokens that differ most)" if instead["rms"] > 3 * most > 0 else ""
        return f"no kernel; plain {instead['rms']:.4f}{few}"
    return f"**refused**: {_cell(cpu['refused'])}"


def _cuda(cuda: dict[str, str]) -> str:
    """Kernels, each with its compute capabilities."""
    if "refused" in cuda:
        return f"**refused**: {_cell(cuda['refused'])}"
    kernels: dict[str, list[str]] = {}
    for capability, kernel in cuda.items():
        kernels.setdefault(kernel, []).append(capability)
    if len(kernels) == 1:
        return next(iter(kernels))
    return "; ".join(f"{kernel} ({', '.join(found)})" for kernel, found in kernels.items())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:160]
