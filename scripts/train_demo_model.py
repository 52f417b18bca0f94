"""Train the demo model from scratch and write it to ``llmq/demo/``: about half an hour on two cores.

The text is that of ``llmq.demo`` (part of every CPython), without the held-out modules. A byte-level BPE is trained
first, then a small Llama with tied embeddings on packed windows: Muon for the matrices (torch 2.9 or later) and AdamW
for the rest, a cosine, bf16 autocast. Docstrings and the language reference are repeated so that there is enough prose
beside the code.

The last line is the number of parameters, the held-out perplexity of the saved bf16 model, and a greedy continuation.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
PROMPT = "The for statement is used to"


def load_demo() -> ModuleType:
    """``llmq.demo``, loaded by its path, because the toolkit cannot be imported without the model that it ships."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "llmq" / "demo" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def docstrings(source: str) -> str:
    """All docstrings of a module, joined by blank lines; empty if the source does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def training_texts(demo: ModuleType) -> list[str]:
    texts: list[str] = []
    for name, text in demo.documents():
        texts += [text] * 3 if name.startswith("topic:") else [text, docstrings(text)]
    return [text for text in texts if text]


def train_tokenizer(texts: list[str], size: int, folder: Path, context: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id(END)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream.extend(encoding.ids)
        stream.append(end)
    return torch.tensor(stream)


def batches(stream: torch.Tensor, window: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless [batch, window + 1] windows: each epoch starts at a random offset and is permuted."""
    while True:
        offset = int(torch.randint(window, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - window - 1, window)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts.split(batch):
            if len(chunk) == batch:
                yield stream[chunk[:, None] + torch.arange(window + 1)]


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor, window: int) -> float:
    """Non-overlapping windows, mean NLL over the predicted tokens, exponentiated."""
    total, count = 0.0, 0
    for chunk in ids.split(window):
        if len(chunk) > 1:
            logits = model(input_ids=chunk[None]).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, chunk[1:], reduction="sum"))
            count += len(chunk) - 1
    return math.exp(total / count)


def learning_rate(step: int, progress: float, peak: float, warmup: int = 40) -> float:
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def compile_in_turn(objective: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, rank: int) -> None:
    """Rank 0 compiles first; the others then use the inductor's cache."""
    if rank != 0:
        dist.barrier()
    objective(ids).backward()
    if rank == 0:
        dist.barrier()


def worker(rank: int, config: LlamaConfig, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """One of ``args.workers`` single-threaded processes: gradients are averaged in every step, rank 0 saves the model.

    Processes rather than threads: a step has hundreds of small parallel regions, and on a busy machine the barrier
    after each costs more than the region.
    """
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers)
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    parameters = matrices + others
    for block in model.model.layers:  # blocks start as the identity: the first steps train the embedding
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    # Muon because time is short: AdamW alone needed three times the tokens for the same loss (4.9), measured once.
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    source = batches(stream, args.context, args.batch * args.workers, torch.Generator().manual_seed(args.seed))
    # With the loss inside the compiled graph a step takes a third of the eager one's processor time.
    objective = torch.compile(lambda ids: loss_of(model, ids), dynamic=False)
    compile_in_turn(objective, torch.zeros(args.batch, args.context + 1, dtype=torch.long), rank)
    model.zero_grad()
    began, mean, progress, step = time.time(), 0.0, 0.0, 0
    while progress < 1.0:
        loss = objective(next(source).chunk(args.workers)[rank])
        loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Loss and elapsed time are reduced too, so that every rank has the same values and stops at the same step.
        clock = max((time.time() - began) / 60 / args.minutes, (step + 1) / args.steps)
        flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([loss.item(), clock])])
        dist.all_reduce(flat)
        flat /= args.workers
        for gradient, part in zip(gradients, flat[:-2].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, progress, args.lr)
            optimizer.step()
            optimizer.zero_grad()
        current, progress = float(flat[-2]), float(flat[-1])
        mean = current if step == 0 else 0.95 * mean + 0.05 * current
        step += 1
        if rank == 0 and step % args.every == 0:
            tokens = step * args.workers * args.batch * args.context
            speed = tokens / (time.time() - began)
            print(f"step {step}  {progress:.0%}  loss {mean:.3f}  {speed:.0f} tokens/s  {tokens:,} tokens", flush=True)
    if rank == 0:
        print(f"trained for {(time.time() - began) / 60:.1f} minutes, {step} steps", flush=True)
        model.to(torch.bfloat16).save_pretrained(args.out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "llmq" / "demo")
    parser.add_argument(
        "--minutes", type=float, default=27, help="length of the schedule, unless --steps ends it sooner"
    )
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes, one per core")
    parser.add_argument("--batch", type=int, default=2, help="windows per worker and step")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--attention", default="eager", help="transformers' attention while training")
    parser.add_argument("--every", type=int, default=20, help="steps between progress lines")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    demo = load_demo()
    texts = training_texts(demo)
    train_tokenizer(texts, args.vocabulary, args.out, args.context)
    fast = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    stream = encode(fast, texts)
    print(f"{sum(map(len, texts)):,} characters, {len(stream):,} tokens", flush=True)

    end = fast.token_to_id(END)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation=args.attention,
    )
    with tempfile.TemporaryDirectory() as folder:
        args.rendezvous = Path(folder, "rendezvous")
        mp.spawn(worker, (config, stream, args), nprocs=args.workers)

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out).eval()
    held_out = tokenizer(demo.evaluation_text(), return_tensors="pt", verbose=False).input_ids[0]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    sample = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    measured = perplexity(model, held_out, args.context)
    print(f"parameters {model.num_parameters():,}  held-out perplexity {measured:.2f}  {tokenizer.decode(sample[0])!r}")


if __name__ == "__main__":
    main()
