"""report.html: whole, small, safe, and true to the report it was made of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llmq.block.attempt import Outcome
from llmq.checkpoint.files import REPORT
from llmq.discovery.reasons import Kind, Reason
from llmq.errors import LlmqError
from llmq.recipe.recipe import Recipe
from llmq.report.measured import digits
from llmq.report.page import PAGE, report_page, write_page
from llmq.report.page.charts import LEVELS
from llmq.report.rows import WeightRow
from tests.llmq.report.page.reports import Page, kept, measure, noted, report

HOSTILE = "<script>alert(1)</script>\"'&</style><img src=x onerror=alert(2)>{{ 7 * 7 }}"
ALONG = ["Error of each block's output", "Seconds per block", "Memory"]


@pytest.mark.parametrize(
    ("layers", "experts", "strips"), [(80, 0, 7), (4, 0, 7), (1, 0, 6), (48, 128, 7), (94, 128, 7)]
)
def test_whole_and_small(layers: int, experts: int, strips: int) -> None:
    html = report_page(report(layers, experts))
    assert len(html.encode()) < 500_000  # of the 1 MB that is promised
    page = Page(html)
    assert page.plots[strips:] == ALONG and len(page.plots) == strips + 3
    assert page.tags["h1"] == 1 and page.tags["main"] == 1


def test_what_is_in_it() -> None:
    made = report(6)
    page = Page(report_page(made))
    text = " ".join(page.text.split())
    assert "37.25 GiB" in text and "4.12" in text and "1 h 23 min" in text and "5.00 GiB" in text
    for row in made.weights[:3]:
        if isinstance(row, WeightRow):
            assert f"block 0, {row.name.removeprefix('model.layers.0.')}: {digits(row.error, 3)}" in text
    assert "block 0, attn.value: not quantized (kept by --keep)" in text
    assert "outside the decoder blocks (1, 256.0 MiB)" in text
    assert "damped 10 times more (1)" in text and "model.layers.0.attn.out" in text
    assert "12 changes to the blocks were tried and 6 kept" in text
    for at, block in enumerate(made.blocks):
        before = block.log[1].before
        assert before is not None
        said = f"block {at}: before the methods' changes {digits(before, 3)}, as written {digits(block.error, 3)}"
        assert said in text
    assert "a warning" in text and made.command in text


def test_experts_are_one_strip_with_their_mean_and_worst() -> None:
    made = report(2, experts=64)
    page = Page(report_page(made))
    alike = [r for r in made.quantized if re.fullmatch(r"model\.layers\.1\.mlp\.experts\.\d+\.up", r.name)]
    mean = sum(r.error for r in alike) / 64
    worst = max(alike, key=lambda r: r.error)
    said = f"mlp.experts.*.up: {digits(mean, 3)}, mean of 64, largest {digits(worst.error, 3)} ({worst.name})"
    assert said in page.text


def test_strips_stand_as_in_the_block_though_kept_weights_come_last() -> None:
    made = report(4)
    moved = made.weights.pop(2)
    made.weights.append(moved)
    order = ["attn.query", "attn.key", "attn.value", "attn.out", "mlp.gate", "mlp.up", "mlp.down"]
    assert Page(report_page(made)).plots[:7] == order


def test_hostile_names_are_text() -> None:
    made = report(3, prefix=f"{HOSTILE}.h", model=HOSTILE, out=f"/data/{HOSTILE}", calibration=HOSTILE, command=HOSTILE)
    made.warnings = [HOSTILE]
    first = made.blocks[0].log[0]
    tried = (replace(first, method=HOSTILE, why=HOSTILE), replace(first, outcome=Outcome.SKIPPED, why=HOSTILE))
    made.blocks[0] = replace(made.blocks[0], log=tried)
    made.weights[0] = noted(made.weights[0], HOSTILE)
    made.weights[2] = kept(made.weights[2], Reason(Kind.BY_USER, HOSTILE))
    html = report_page(made, [measure(HOSTILE, HOSTILE, 5.0, protocol=HOSTILE)])
    page = Page(html)
    assert "alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert page.tags["script"] == 1 and page.tags["style"] == 1
    assert page.plots[-3:] == ALONG


def test_policy_lets_only_its_own_script_run() -> None:
    import base64
    import hashlib

    html = report_page(report(2))
    policy = re.search(r'Security-Policy" content="([^"]*)"', html)
    assert policy and policy[1].replace("&#39;", "'").startswith("default-src 'none'")
    for part in ("style", "script"):
        content = re.search(rf"<{part}>(.*?)</{part}>", html, re.DOTALL)
        assert content
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{part}-src &#39;sha256-{digest}&#39;" in html


def test_the_recipe_can_be_read_back() -> None:
    recipe = Recipe(("awq", "gptq"), keep=("lm_head",))
    html = report_page(report(2, recipe=recipe.to_dict()))
    text = [part for part in re.findall(r"<code>(.*?)</code>", html, re.DOTALL) if part.startswith("methods")][0]
    from html import unescape

    assert Recipe.from_dict(yaml.safe_load(unescape(text))) == recipe


def test_measured_numbers(tmp_path: Path) -> None:
    made = report(3)
    (tmp_path / REPORT).write_text(made.to_json())
    mine = [measure("perplexity:demo", "perplexity", 5.5), measure("hellaswag", "acc", 0.6, "share", True)]
    base = [measure("perplexity:demo", "perplexity", 5.0), measure("hellaswag", "acc", 0.64, "share", True)]
    assert write_page(tmp_path, mine, base) == tmp_path / PAGE
    text = " ".join(Page((tmp_path / PAGE).read_text()).text.split())
    assert "5.000 of the base, 90.9 % kept" in text  # 5 / 5.5
    assert "93.8 %" in text  # 0.6 / 0.64
    assert "windows of 2048 tokens" in text
    with pytest.raises(LlmqError, match=r"report\.json"):
        write_page(tmp_path / "absent", mine)


def test_a_report_of_an_earlier_llmq() -> None:
    made = report(3)
    made.blocks = [replace(block, memory=None, peak=None) for block in made.blocks]
    assert Page(report_page(made)).plots[-2:] == ALONG[:2]


def test_a_run_on_a_gpu() -> None:
    made = report(3, predicted_device_memory=3 * 2**30)
    for number, block in enumerate(made.blocks[1:]):  # the first was done elsewhere
        made.blocks[1 + number] = replace(block, device=(2 + number) * 2**29)
    page = Page(report_page(made))
    assert page.plots[-4:] == [*ALONG, "GPU memory"]
    assert "1.50 GiB at most; the plan predicted 3.00 GiB." in page.text


def test_names_of_the_checkpoint_may_begin_otherwise() -> None:
    made = report(2)
    made.weights = [replace(row, name=row.name.replace("model.layers", "transformer.h")) for row in made.weights]
    assert "attn.query" in Page(report_page(made)).plots


def colours(theme: str) -> list[str]:
    """The heat map's colours of a theme, from the style sheet."""
    import llmq.report.page

    css = (Path(llmq.report.page.__file__).parent / "templates" / "style.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    return re.findall(r"--h\d: (#[0-9a-f]{6})", light if theme == "light" else dark)[:LEVELS]


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_colour_scale_can_be_told_apart_without_hue(theme: str) -> None:
    """Each step's contrast to the next is visible in grey, so for any colour vision; the order is one way."""
    values = [luminance(colour) + 0.05 for colour in colours(theme)]
    assert len(values) == LEVELS
    steps = [a / b if theme == "light" else b / a for a, b in zip(values, values[1:], strict=False)]
    assert min(steps) > 1.08 and max(values) / min(values) > 7
