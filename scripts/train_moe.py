"""Train a small mixture of experts on text, for measuring quantizers: about half an hour on two cores.

    python scripts/train_moe.py ../shared/data/books/calibration.txt /tmp/moe
    python scripts/train_moe.py ../shared/data/books/calibration.txt /tmp/moe --minutes 50 --experts 32

A byte-level BPE is trained first, then a Qwen3-MoE with the usual loss that balances its experts: AdamW, a cosine, bf16
autocast. The text's last twentieth is held out. The last line is the number of parameters and the held-out perplexity
of the saved bf16 model. The result is not part of the project.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train_demo_model import batches, encode, learning_rate, perplexity, train_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

CONTEXT = 256
HELD_OUT = 20


def build(args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """The untrained model."""
    torch.manual_seed(args.seed)
    config = Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def train(model: Qwen3MoeForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Train the model for a number of minutes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    source = batches(stream, CONTEXT, args.batch, torch.Generator().manual_seed(args.seed))
    began, step, mean, progress = time.time(), 0, 0.0, 0.0
    while progress < 1:
        ids = next(source)[:, :-1]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, progress, args.lr)
        optimizer.step()
        optimizer.zero_grad()
        mean = float(loss) if step == 0 else 0.95 * mean + 0.05 * float(loss)
        step, progress = step + 1, (time.time() - began) / 60 / args.minutes
        if step % 50 == 0:
            tokens = step * args.batch * CONTEXT
            print(
                f"step {step}  {progress:.0%}  loss {mean:.3f}  {tokens / (time.time() - began):.0f} tokens/s",
                flush=True,
            )


def main() -> None:
    """Parse, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text = args.text.read_text(encoding="utf-8")
    cut = len(text) - len(text) // HELD_OUT
    train_tokenizer([text[:cut]], args.vocab, args.out, 1024)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    stream, held_out = encode(tokenizer, [text[:cut]]), encode(tokenizer, [text[cut:]])
    model = build(args)
    train(model, stream, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    count = sum(p.numel() for p in saved.parameters())
    print(f"{count:,} parameters, held-out perplexity {perplexity(saved, held_out[: 40 * CONTEXT], CONTEXT):.2f}")


if __name__ == "__main__":
    main()
