"""The quality of a mixture's experts: variants of methods, beside each other and beside other tools' folders.

    python scripts/bench_experts.py MODEL CALIBRATION.txt HELDOUT.txt -o FILE.jsonl [--variants gptq gptq:own gptq:all]
    python scripts/bench_experts.py MODEL CALIBRATION.txt HELDOUT.txt -o FILE.jsonl --folders other@4g64@128@0=FOLDER
    python scripts/bench_experts.py MODEL CALIBRATION.txt HELDOUT.txt -o FILE.jsonl --variants

A variant is a method, and after a colon 'all' (--route all), 'own' (no statistics of other tokens) or the number of
tokens at which an expert's own statistics count half (32 in llmq). It is calibrated for every --samples and --seeds,
which are different windows of the text; rtn once. Models are measured in float32 on the same held-out windows, spread
over the text, as loaded by stock from_pretrained: KL(unquantized ‖ quantized) in nats and perplexity; and each expert's
output on the held-out rows that the unquantized model sends to it, relative to the unquantized expert's, each row times
its routing weight. What is in the results already is not run again, so the last line only prints the tables.

The error behind ± is that of the mean difference to the first variant, over windows and seeds, which are the same for
both: sqrt(variance of the windows' means / windows + variance of the seeds' means / seeds).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_quality import load, parse_scheme
from torch import Tensor
from transformers import AutoTokenizer

from llmq import job
from llmq.block import expert as blending
from llmq.data.tokens import tokenize
from llmq.discovery.blocks import build, find
from llmq.recipe.recipe import Recipe
from llmq.report.report import Report

VARIANTS = ["gptq", "rtn", "gptq:own", "gptq:all", "awq", "awq+gptq", "signround"]
BINS = (0, 1, 16, 48, 128, 384, 1536, 10**9)


@dataclass(frozen=True)
class Run:
    """What identifies a measurement; samples and seed are 0 if there is no calibration."""

    variant: str
    scheme: str
    samples: int
    seed: int


@dataclass(frozen=True)
class Result(Run):
    """kl, nll: means of each held-out window, in nats; experts: (block, expert, calibration tokens, relative error)."""

    kl: list[float]
    nll: list[float]
    experts: list[tuple[int, int, int, float]]
    seconds: float = 0.0

    @property
    def run(self) -> Run:
        """What identifies it."""
        return Run(self.variant, self.scheme, self.samples, self.seed)


class Base:
    """The unquantized model on the held-out windows: its log-probabilities, and what enters its experts."""

    def __init__(self, folder: Path, windows: Tensor, rows: int) -> None:
        self.windows = windows
        self.model = load(folder)
        blocks = find(build(folder, torch.float32)).blocks
        self.names = [None if b.experts is None else f"{b.name}.{b.experts.module}" for b in blocks]
        self.entering: dict[str, list[Tensor]] = {}
        with torch.inference_mode():
            hooks = [self._keep(name) for name in self.names if name is not None]
            self.logits = [log_probabilities(self.model, ids) for ids in windows[:rows]]
            for hook in hooks:
                hook.remove()
            self.logits += [log_probabilities(self.model, ids) for ids in windows[rows:]]

    def _keep(self, name: str) -> Any:
        def keep(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            given = [*args, *kwargs.values()]
            before = self.entering.get(name)
            self.entering[name] = given if before is None else [torch.cat(p) for p in zip(before, given, strict=True)]

        return self.model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)

    def measure(self, model: Any) -> tuple[list[float], list[float]]:
        """KL and negative log-likelihood of each window."""
        kl, nll = [], []
        with torch.inference_mode():
            for ids, want in zip(self.windows, self.logits, strict=True):
                have = log_probabilities(model, ids)
                kl.append(float((want.exp() * (want - have)).sum(-1).mean()))
                nll.append(-float(have.gather(1, ids[1:, None]).mean()))
        return kl, nll

    def errors(self, model: Any) -> list[tuple[int, int, float]]:
        """(block, expert, relative error of its weighted output) for every expert that is chosen."""
        found = []
        with torch.inference_mode():
            for block, name in enumerate(self.names):
                if name is None:
                    continue
                rows, choices, weights = self.entering[name]
                pair = [m.get_submodule(name) for m in (self.model, model)]
                for expert in range(int(choices.max()) + 1):
                    token, place = torch.where(choices == expert)
                    if not len(token):
                        continue
                    one, weight = torch.full((len(token), 1), expert), weights[token, place][:, None]
                    want, have = (experts(rows[token], one, weight) for experts in pair)
                    found.append((block, expert, float((have - want).norm() / want.norm())))
        return found


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of each next token of one window: [tokens − 1, vocabulary]."""
    return model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


def spread(ids: Tensor, seqlen: int, count: int, seed: int = 0) -> Tensor:
    """Up to `count` windows, evenly spread over the text; seeds above 0 move all of them on: [count, seqlen]."""
    whole = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    count = min(count, len(whole))
    step = len(whole) / count
    return whole[[(i * len(whole) // count + round(seed * step / 7)) % len(whole) for i in range(count)]]


def parse_variant(text: str) -> tuple[tuple[str, ...], str, float]:
    """'awq+gptq:all' → methods, route, and the number of tokens at which an expert's own statistics count half."""
    methods, _, how = text.partition(":")
    prior = {"": float(blending.PRIOR_TOKENS), "all": float(blending.PRIOR_TOKENS), "own": 1e-9}
    names = tuple(methods.split("+"))
    return names, "all" if how == "all" else "own", prior[how] if how in prior else max(1e-9, float(how))


def quantize(model: str, out: Path, run: Run, ids: Tensor) -> Report:
    """Quantize with a variant, as llmq does it but for the number of tokens that other tokens count as."""
    methods, route, prior = parse_variant(run.variant)
    usual = blending.PRIOR_TOKENS
    try:
        blending.PRIOR_TOKENS = prior  # type: ignore[assignment]
        return job.quantize(model, out, Recipe(methods=methods, scheme=parse_scheme(run.scheme), route=route), ids=ids)
    finally:
        blending.PRIOR_TOKENS = usual


def tokens_of(report: Report) -> dict[tuple[int, int], int]:
    """The calibration tokens of each expert: (block, expert) → number."""
    rows = [row for row in report.quantized if row.expert is not None and row.tokens is not None]
    return {(row.block, row.expert): row.tokens for row in rows if row.expert is not None and row.tokens is not None}


def read(file: Path) -> list[Result]:
    """All results in a file, in order."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Result(**{**data, "experts": [tuple(e) for e in data["experts"]]}) for data in map(json.loads, lines)]


def difference(mine: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of mine − reference, both [seeds][windows], and its standard error over windows and seeds."""
    apart = torch.tensor(mine, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    parts = [apart.mean(0), *([apart.mean(1)] if len(apart) > 1 else [])]
    return float(apart.mean()), math.sqrt(sum(float(p.var() / len(p)) for p in parts))


def of_seeds(results: Iterable[Result], seeds: Iterable[int]) -> list[Result]:
    """One result for each seed; the only one for all of them if it has no calibration."""
    found = {result.seed: result for result in results}
    return [found[seed] if seed in found else found[0] for seed in seeds]


def table(results: Sequence[Result], base: float, first: str) -> Iterable[str]:
    """Lines of Markdown: for every scheme and number of samples, each variant and its difference to the first."""
    yield "| scheme | windows | variant | perplexity | KL | − KL of " + first + " | experts' error |"
    yield "|---|---|---|---|---|---|---|"
    for scheme in dict.fromkeys(r.scheme for r in results):
        for samples in sorted({r.samples for r in results if r.scheme == scheme and r.samples}, reverse=True):
            mine = [r for r in results if r.scheme == scheme and r.samples in (0, samples)]
            reference = {r.seed: r for r in mine if r.variant == first}
            for name in dict.fromkeys(r.variant for r in mine):
                have = [r for r in mine if r.variant == name]
                seeds = [s for s in reference if have[0].samples == 0 or s in {r.seed for r in have}]
                if not seeds:
                    continue
                chosen = of_seeds(have, seeds)
                value, error = difference([r.kl for r in chosen], [reference[s].kl for s in seeds])
                kl = sum(sum(r.kl) / len(r.kl) for r in chosen) / len(chosen)
                nll = sum(sum(r.nll) / len(r.nll) for r in chosen) / len(chosen)
                apart = "" if name == first else f"{value:+.5f} ± {error:.5f}"
                each = geometric([e[3] for r in chosen for e in r.experts])
                perplexity = f"{math.exp(nll):.3f} ({math.exp(nll - base) - 1:+.2%})"
                cells = (scheme, f"{samples} × {len(seeds)}", name, perplexity, f"{kl:.5f}", apart, f"{each:.4f}")
                yield f"| {' | '.join(cells)} |"


def by_tokens(results: Sequence[Result], scheme: str, variants: Sequence[str]) -> Iterable[str]:
    """Lines of Markdown: the geometric mean of the experts' errors by the number of their calibration tokens."""
    yield f"| tokens ({scheme}) | experts | {' | '.join(variants)} |"
    yield "|---" * (len(variants) + 2) + "|"
    found: dict[str, dict[tuple[int, int, int, int], tuple[int, float]]] = {name: {} for name in variants}
    for r in results:
        if r.scheme == scheme and r.variant in found and r.samples:
            found[r.variant] |= {(r.samples, r.seed, b, e): (tokens, error) for b, e, tokens, error in r.experts}
    plain = next(({(b, e): x for b, e, _, x in r.experts} for r in results if r.run == Run("rtn", scheme, 0, 0)), None)
    calibrated = [name for name in variants if found[name]]
    common = set.intersection(*(set(found[name]) for name in calibrated))
    for low, high in zip(BINS, BINS[1:], strict=False):
        keys = [key for key in common if low <= found[calibrated[0]][key][0] < high]
        if keys:
            values = [
                geometric([plain[key[2:]] if name == "rtn" and plain else found[name][key][1] for key in keys])
                for name in variants
            ]
            name = f"{low}–{high - 1}" if high < BINS[-1] else f"≥ {low}"
            yield f"| {name} | {len(keys)} | " + " | ".join(f"{value:.4f}" for value in values) + " |"


def geometric(values: Sequence[float]) -> float:
    """The geometric mean; of none, NaN."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def main() -> None:
    """Run what is not in the results yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("--folders", nargs="*", default=[], help="NAME@SCHEME@SAMPLES@SEED=FOLDER")
    parser.add_argument("--schemes", nargs="+", default=["4g64", "3g64", "2g64"])
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 4])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text, heldout = (tokenize(f.read_text(encoding="utf-8"), tokenizer) for f in (args.calibration, args.heldout))
    base = Base(args.model, spread(heldout, args.seqlen, args.windows), args.windows // 2)
    _, nll = base.measure(base.model)
    reference = sum(nll) / len(nll)
    print(f"unquantized: perplexity {math.exp(reference):.4f} on {len(nll)} windows of {args.seqlen}", flush=True)
    done = {result.run for result in read(args.out)}

    def note(run: Run, make: Callable[[Path], tuple[Path, Report | None]]) -> None:
        if run in done:
            return
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            folder, report = make(Path(place))
            model, took = load(folder), time.perf_counter() - began
            counts = {} if report is None or not run.samples else tokens_of(report)
            each = [(b, e, counts.get((b, e), 0), error) for b, e, error in base.errors(model)]
            result = Result(
                **asdict(run), kl=(found := base.measure(model))[0], nll=found[1], experts=each, seconds=took
            )
        with args.out.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        done.add(run)
        print(run, f"KL {sum(result.kl) / len(result.kl):.5f}, {took:.1f} s", flush=True)

    for name in args.folders:
        names, _, path = name.partition("=")
        variant, scheme, samples, seed = names.split("@")
        note(Run(variant, scheme, int(samples), int(seed)), lambda _, path=path: (Path(path), None))
    for samples in args.samples:
        for seed in range(args.seeds):
            ids = spread(text, args.seqlen, samples, seed)
            for scheme in args.schemes:
                for variant in args.variants:
                    run = Run(variant, scheme, 0, 0) if variant == "rtn" else Run(variant, scheme, samples, seed)
                    note(run, lambda out, run=run, ids=ids: (out, quantize(str(args.model), out, run, ids)))
    results = read(args.out)
    print("\n".join(table(results, reference, VARIANTS[0])))
    names = [n for n in dict.fromkeys(r.variant for r in results) if n.split(":")[0] in ("gptq", "rtn")]
    for scheme in dict.fromkeys(r.scheme for r in results):
        print("\n".join(["", *by_tokens(results, scheme, names)]))


if __name__ == "__main__":
    main()
