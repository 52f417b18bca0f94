"""Reports as runs of any size would write them, and what a page says when it is read as HTML."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

from llmq.block.attempt import Attempt, Outcome
from llmq.discovery.reasons import Kind, Reason
from llmq.grids.scheme import Scheme
from llmq.report.bits import BitsRow, TriedRow
from llmq.report.report import Report
from llmq.report.rows import BlockRow, KeptRow, WeightRow

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
LOADS = ("src", "srcset", "data", "poster", "background", "action", "ping", "style")
FOUR = {"activations": None, "bits": 4, "double_quant": False, "grid": "int", "group_size": 128, "symmetric": True}


def report(
    layers: int = 80, experts: int = 0, prefix: str = "model.layers", *, routed: bool = False, **changes: Any
) -> Report:
    """A plausible run: seven weights a block, or attention and experts; one weight kept, one fallen back.

    routed: the experts are known as such, the first of each block without a token.
    """
    draw, scheme = random.Random(layers + experts), Scheme()
    names = {f"attn.{name}": (4096, 4096) for name in ("query", "key", "value", "out")}
    if experts:
        names |= {f"mlp.experts.{i}.{n}": (1536, 4096) for i in range(experts) for n in ("gate", "up", "down")}
    else:
        names |= {f"mlp.{n}": (14336, 4096) for n in ("gate", "up", "down")}
    weights: list[WeightRow | KeptRow] = []
    blocks: list[BlockRow] = []
    for at in range(layers):
        for name, shape in names.items():
            size = shape[0] * shape[1] * 33 // 64
            error = draw.uniform(0.03, 0.2)
            row = WeightRow(f"{prefix}.{at}.{name}", shape, at, size, scheme, error, seconds=1.0)
            if routed and "experts" in name:
                number = int(name.split(".")[2])
                tokens = number * (at + 1)
                notes = () if number else ("no token chose this expert",)
                row = replace(row, expert=number, tokens=tokens, alpha=tokens / (tokens + 32), notes=notes)
            weights.append(row)
        error = draw.uniform(0.01, 0.1)
        pair = Attempt("awq", "norm → query, key", error * 1.5, error * 1.6, Outcome.UNDONE)
        log = (pair, Attempt("AWQ", None, error * 1.2, error, Outcome.KEPT))
        seconds, memory = draw.uniform(50, 80), 3 * 2**30 + at
        share = draw.uniform(0.9, 1.0) if routed else None
        blocks.append(BlockRow(f"{prefix}.{at}", error, seconds, log, memory, 2**30 + memory, routing=share))
    weights[2] = kept(weights[2], Reason(Kind.BY_USER, "kept by --keep"))
    weights[3] = noted(weights[3], "damped 10 times more")
    outside = Reason(Kind.OUTSIDE, "outside the decoder blocks")
    weights.append(KeptRow("head", (32000, 4096), None, 2**28, outside))
    made = {
        "model": "org/name", "out": "/data/name-w4", "recipe": {"methods": ["awq", "gptq"], "scheme": FOUR},
        "calibration": "the demo text", "bits_per_weight": 4.125, "bits_per_weight_whole": 4.6,
        "source_bytes": 140 * 10**9, "bytes": 40 * 10**9, "peak_memory": 5 * 2**30, "predicted_memory": 6 * 2**30,
        "seconds": 5000.0, "weights": weights, "blocks": blocks, "warnings": ["a warning"],
        "format": "compressed-tensors pack-quantized", "loaders": ["a loader reads it"],
        "examples": {"transformers": True, "vllm": False},
        "command": "llmq quantize org/name -o name-w4 --recipe recipe.yaml", "versions": {"llmq": "0.1.0"},
    }  # fmt: skip
    return Report(**(made | changes))


def mixed(layers: int = 4, counts: tuple[int, ...] = (2, 3, 4, 8), experts: int = 0, **changes: Any) -> Report:
    """A run that chose the bits: `report`, whose quantized weights have these bits in turn."""
    made = report(layers, experts, routed=bool(experts), chosen=chosen())
    turn = 0
    for at, row in enumerate(made.weights):
        if isinstance(row, WeightRow):
            bits = counts[turn % len(counts)]
            size = row.shape[0] * row.shape[1] * (8 * bits + 1) // 64
            made.weights[at] = replace(row, scheme=Scheme(bits), bytes=size)
            turn += 1
    return replace(made, **changes)


def chosen(**changes: Any) -> BitsRow:
    """How bits were chosen: the loss falls to a quarter with each bit more."""
    tried = (TriedRow("as scored", 3.1, 0.08, 0.1), TriedRow("fewest bits dearer", 3.09, 0.085, 0.11))
    curve = tuple((2.125 + i / 8, 0.25 * 4.0 ** -(i / 8)) for i in range(49))
    uniform = tuple((str(Scheme(b)), b + 0.125, 0.4 * 4.0 ** -(b - 2)) for b in (2, 3, 4, 5, 6, 8))
    row = BitsRow("3.1 bits per weight", "divergence", 28, tried, (*curve, (16.0, 0.0)), uniform, 12.5, written=0.05)
    return replace(row, **changes)


def kept(row: WeightRow | KeptRow, reason: Reason) -> KeptRow:
    """The row of a weight as though it had been left alone."""
    return KeptRow(row.name, row.shape, row.block, row.bytes, reason)


def noted(row: WeightRow | KeptRow, note: str) -> WeightRow:
    """The row of a quantized weight with a note."""
    assert isinstance(row, WeightRow)
    return replace(row, notes=(note,))


def measure(task: str, metric: str, value: float, unit: str = "", better: bool | None = False, **more: Any) -> Any:
    """A measured number."""
    interval = {"low": 0.98 * value, "high": 1.02 * value, "protocol": "windows of 2048 tokens"} | more
    return SimpleNamespace(task=task, metric=metric, value=value, unit=unit, higher_is_better=better, **interval)


class Page(HTMLParser):
    """A page, read strictly: what is opened is closed in order; ids are unique; nothing is loaded from anywhere.

    text: all words outside style and script. plots: the title of each picture with role img, which must have a
    description too. tags: how many of each.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.named: dict[str, str] = {}
        self.labels: list[list[str]] = []
        self.links: list[str] = []
        self.text = ""
        self._id = ""
        assert html.startswith("<!doctype html>")
        self.feed(html)
        self.close()
        assert not self.open, self.open
        assert all(count == 1 for count in self.ids.values()), self.ids.most_common(3)
        assert all(link[1:] in self.ids for link in self.links), "a link within the page leads nowhere"
        assert all(label in self.ids for labels in self.labels for label in labels)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice"
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use", "form")
        assert not [name for name in given if name in LOADS or name.startswith("on") or name == "xlink:href"], attrs
        self.tags[tag] += 1
        if "id" in given:
            self.ids[given["id"]] += 1
        if "href" in given:
            assert tag == "a" and given["href"].startswith("#")
            self.links.append(given["href"])
        if given.get("role") == "img":
            self.labels.append(given["aria-labelledby"].split())
        if tag in ("title", "desc"):
            self._id = given.get("id", "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        self._id = "" if tag in ("title", "desc") else self._id

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            assert not any(word in data for word in ("http:", "https:", "url(", "@import", "fetch(", "import("))
            return
        self.text += data
        if self._id:
            self.named[self._id] = self.named.get(self._id, "") + data

    @property
    def plots(self) -> list[str]:
        """The titles of all pictures; each has a description."""
        for title, description in self.labels:
            assert self.named[title].strip() and self.named[description].strip()
        return [self.named[title] for title, _ in self.labels]
