"""report.html as a browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmq.report.page import report_page
from tests import browser
from tests.llmq.report.page.reports import Page, measure, report
from tests.llmq.report.page.test_page import HOSTILE


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page(report(80), [measure("perplexity:demo", "perplexity", 5.5)]))
    return file


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", list(browser.SIZES))
def test_large_model(chromium: Any, large: Path, size: str, theme: str) -> None:
    shot = large.with_name(f"{size}-{theme}.png")
    seen = browser.look(chromium, large, size, theme, shot)
    browser.check(seen, large, size)
    assert [title for title, *_ in seen.plots] == Page(large.read_text()).plots
    heat = [colours for title, _, _, colours in seen.plots if title.startswith(("attn.", "mlp."))]
    assert len(heat) == 7 and max(heat) > 5  # the colours of the scale are really there
    assert shot.stat().st_size > 50_000


@pytest.mark.parametrize(
    "of",
    [
        {"layers": 1},
        {"layers": 40, "experts": 128, "routed": True},
        {"layers": 3, "prefix": f"{HOSTILE}.h", "model": HOSTILE},
    ],
    ids=["a layer", "experts", "hostile"],
)
def test_other_models(chromium: Any, tmp_path: Path, of: dict[str, Any]) -> None:
    file = tmp_path / "report.html"
    file.write_text(report_page(report(**of), [measure(HOSTILE, "acc", 0.5)]))
    browser.check(browser.look(chromium, file, "phone", "light"), file, "phone")


def test_the_two_themes_differ_and_content_needs_no_script(chromium: Any, large: Path) -> None:
    context = chromium.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(large.as_uri())
    dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    assert dark != page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    context.close()
    plain = chromium.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto(large.as_uri())
    assert page.locator("svg[role=img]").count() == 10
    assert page.get_by_role("button", name="Copy").count() == 0  # a button that could do nothing is not shown
    page.get_by_text("The numbers as a table").first.click()
    assert page.get_by_role("region", name="Error of every weight, as a table").is_visible()
    plain.close()


def test_by_keyboard(chromium: Any, large: Path) -> None:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(large.as_uri())
    focused = "() => document.activeElement.innerText"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the content"
    assert page.get_by_text("Skip to the content").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    table = page.locator("details[open] table.sortable").first
    assert table.locator("tbody tr").count() == 80
    head = table.locator("thead button").nth(1)
    head.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    values = [float(text) for text in table.locator("tbody tr td:nth-child(2)").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    assert table.locator("thead th").nth(1).get_attribute("aria-sort") == "descending"
    context.close()
