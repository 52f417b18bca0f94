"""Pages opened in a headless Chromium, where the machine has one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (360, 740), "desktop": (1280, 900)}
NO_SCRIPT_NEEDED = """() => [...document.querySelectorAll('svg[role=img]')].map(svg => {
  const box = svg.getBoundingClientRect(), paint = new Set();
  for (const part of svg.querySelectorAll('rect, circle, polyline, path, line')) {
    const style = getComputedStyle(part);
    if (style.fill !== 'none') paint.add(style.fill);
    if (style.stroke !== 'none') paint.add(style.stroke);
  }
  return [svg.querySelector('title').textContent, box.width, box.height, paint.size];
})"""
WIDER = """() => [...document.querySelectorAll('body *')]
  .filter(part => part.getBoundingClientRect().right > innerWidth + 1 && !part.closest('.scroll, pre, svg'))
  .map(part => part.outerHTML)"""


@dataclass
class Seen:
    """What a browser made of a page. plots: (title, width, height, colours); wide: what sticks out on the right."""

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    plots: list[tuple[str, float, float, int]] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)
    scroll_width: int = 0


def path() -> str | None:
    """Where a Chromium is: LLMQ_CHROMIUM, or one of the usual names."""
    given = os.environ.get("LLMQ_CHROMIUM")
    return given or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser. Skips, with the reason, where there is no Chromium or no playwright."""
    executable = path()
    if executable is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell, or set LLMQ_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def look(browser: Any, file: Path, size: str, theme: str, shot: Path | None = None, script: bool = True) -> Seen:
    """Open a page at a size and in a theme; everything that it asked for or complained of is noted."""
    seen = Seen()
    width, height = SIZES[size]
    viewport = {"width": width, "height": height}
    context = browser.new_context(viewport=viewport, color_scheme=theme, java_script_enabled=script)
    page = context.new_page()
    page.on("console", lambda message: seen.problems.append(message.text))
    page.on("pageerror", lambda error: seen.problems.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    seen.plots = [tuple(plot) for plot in page.evaluate(NO_SCRIPT_NEEDED)]
    seen.wide = page.evaluate(WIDER)
    seen.scroll_width = page.evaluate("() => document.documentElement.scrollWidth")
    if shot is not None:
        page.screenshot(path=str(shot), full_page=True)
    context.close()
    return seen


def check(seen: Seen, file: Path, size: str) -> None:
    """No complaint, no request but the file itself, every plot drawn, nothing wider than the screen."""
    assert not seen.problems
    assert seen.requests == [file.as_uri()]
    assert seen.plots and all(width > 60 and height >= 15 and paint for _, width, height, paint in seen.plots), (
        seen.plots
    )
    assert seen.scroll_width <= SIZES[size][0] and not seen.wide, seen.wide[:3]
