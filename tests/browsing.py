"""Pages of ours in a real browser, headless: what they say and ask for, and whether they can be read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next((path for name in BROWSERS if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(PATH is None, reason=f"no browser on PATH: none of {', '.join(BROWSERS)}")
CONTRAST = 4.5  # WCAG 2.2, 1.4.3: text of normal size


class Opened:
    """A page, and all that it said and asked for."""

    def __init__(self, browser: Browser, path: Path, **options: Any):
        self.page: Page = browser.new_page(**options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.address = path.as_uri()

    def close(self) -> None:
        """Raises: AssertionError where it complained, or wanted anything but itself."""
        self.page.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("data:")] == [self.address]


# colours of every piece of text that is shown: its own, and that of what it stands on
COLOURS = """() => {
  const under = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'none';
  };
  const found = new Map();
  for (const element of document.querySelectorAll('body *')) {
    const style = getComputedStyle(element);
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const box = element.closest('.op, .tensor');
    const bar = element.parentElement?.classList.contains('bar') && element.nextElementSibling;
    const on = box ? [getComputedStyle(box.querySelector('path')).fill] : [under(element)];
    if (bar) on.push(getComputedStyle(bar).backgroundColor);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    for (const each of on) found.set(`${colour} on ${each}`, [colour, each, element.outerHTML.slice(0, 80)]);
  }
  return [...found.values()];
}"""


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG defines it."""
    channels = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(share * each for share, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def assert_legible(page: Page, least: int = 15) -> None:
    """Raises: AssertionError where a piece of text that is shown hardly differs from what it stands on, or there are fewer than
    ``least`` pairs of colours."""
    colours = page.evaluate(COLOURS)
    assert len(colours) >= least
    for colour, on, where in colours:
        assert contrast(colour, on) >= CONTRAST, f"{colour} on {on}: {where}"
