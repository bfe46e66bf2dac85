"""The comparison's pages in a real browser, headless: they can be read, whatever the light, the width and the reader's hands."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browsing import Opened, assert_legible, contrast, luminance, needs_browser
from made import made_result
from pages import resolve
from playwright.sync_api import Browser, Page

from moecompiler.comparison.report.matrix import write_matrix
from moecompiler.comparison.report.write import write_report

pytestmark = [needs_browser, pytest.mark.xdist_group("comparison-report")]
SHAPES = 3.0  # WCAG 2.2, 1.4.11: contrast of what is not text
# everything that a number is behind and that its numbers are read from
MARKS = """(within) => [...document.querySelectorAll(within + ' [data-from]')].map(element => ({
  from: element.dataset.from, left: element.style.left, bottom: element.style.bottom, width: element.style.width,
  height: element.style.height, text: element.textContent.trim(), tip: element.dataset.tip ?? ''}))"""


Pages = Callable[[str], Path]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Name → a report with failures (``bad``), one of 32 layers, 8 experts and 512 tokens (``large``), and a ``matrix``."""
    base = tmp_path_factory.mktemp("comparison")

    @functools.cache
    def written(name: str) -> Path:
        if name == "matrix":
            return write_matrix({"float16": made_result(), "int4": made_result(bad=True)}, base / name)
        return write_report(made_result(bad=True) if name == "bad" else made_result(32, 8, 512, bad=True), base / name)

    return written


@pytest.fixture
def page(browser: Browser, pages: Pages) -> Iterator[Page]:
    opened = Opened(browser, pages("bad"), viewport={"width": 1400, "height": 900}, color_scheme="light")
    yield opened.page
    opened.close()


def tip_of(page: Page) -> str:
    return page.locator("#tip").inner_text() if page.locator("#tip").is_visible() else ""


def data_of(page: Page) -> dict:
    return page.evaluate("JSON.parse(document.querySelector('#report-data').textContent)")


def test_marks_are_where_their_numbers_are(page: Page) -> None:
    """A logarithm's places are in proportion; so are bars'."""
    data = data_of(page)
    for within in ("#layers", "#model .plots"):
        drawn = [each for each in page.evaluate(MARKS, within) if each["bottom"]]
        values = [resolve(data, each["from"]) for each in drawn]
        places = [
            (math.log10(value), float(each["bottom"][:-1])) for value, each in zip(values, drawn, strict=True) if value
        ]
        assert len(places) > 20
        (x0, y0), (x1, y1) = min(places), max(places)
        for x, y in places:
            assert y == pytest.approx(y0 + (x - x0) * (y1 - y0) / (x1 - x0), abs=0.02)
        assert all(float(each["bottom"][:-1]) < y0 for value, each in zip(values, drawn, strict=True) if value == 0)
    for within, side in (("#ops .bars", "width"), (".columns", "height")):
        bars = page.evaluate(MARKS, within)
        scales = {
            round(float(each[side][:-1]) / value, 3)
            for each in bars
            if (value := resolve(data, each["from"])) > 50 or side == "width"
        }
        assert len(bars) >= 8
        assert max(scales) - min(scales) < 0.01 * max(scales), scales


def test_numbers_that_are_written_are_those_of_the_json(page: Page) -> None:
    data = data_of(page)
    cells = page.evaluate(MARKS, "#routing .heat")
    assert len(cells) == 2 * 4 * 4
    for cell in cells:
        assert cell["text"] == str(resolve(data, cell["from"]) or "·")
    for each in page.evaluate(MARKS, ".strip"):
        assert f"{resolve(data, each['from']):.1e}" in each["tip"] or resolve(data, each["from"]) == 0
    written = [each for each in page.evaluate(MARKS, "#layers details table") if not each["from"].endswith("/0/0")]
    assert len(written) > 60
    for each in written:
        value, shown = resolve(data, each["from"]), each["text"].lstrip("×")
        assert shown == "∞" if value == "Infinity" else float(shown) == pytest.approx(value, rel=0.06)


def test_numbers_under_pointer_and_keys(page: Page) -> None:
    area = page.locator("#layers .area").first
    assert tip_of(page) == ""
    area.focus()
    page.keyboard.press("ArrowRight")
    first = tip_of(page)
    assert first.startswith("model.embed_tokens, prefill, position 0 to 15\nplugins on: 0")
    page.keyboard.press("ArrowRight")
    assert tip_of(page).startswith("model.layers.0, prefill")
    page.keyboard.press("ArrowLeft")
    assert tip_of(page) == first
    page.keyboard.press("Escape")
    assert tip_of(page) == ""
    area.hover()
    said = tip_of(page).splitlines()
    assert len(said) == 3
    assert said[0].startswith("model.layers.")
    assert re.fullmatch(r"plugins on: \S+, worst token \S+", said[1])
    page.mouse.move(0, 0)
    page.locator("#model .strip:visible").focus()
    page.keyboard.press("ArrowLeft")
    assert "position 23, decode\nplugins on: KL 2.0e+00" in tip_of(page)
    page.keyboard.press("Tab")
    assert tip_of(page) == ""


def test_programs_of_the_text_are_switched(page: Page) -> None:
    first, second = page.locator(".strip").all()
    assert (first.is_visible(), second.is_visible()) == (True, False)
    page.get_by_role("button", name="plugins off").click()
    assert (first.is_visible(), second.is_visible()) == (False, True)
    assert [each.get_attribute("aria-pressed") for each in page.locator(".switch").all()] == ["false", "true"]


def test_ops_are_sorted_and_filtered(page: Page) -> None:
    page.locator("#all-cases summary").click()
    rows = page.locator("#cases tbody tr:visible")
    assert rows.count() == 144
    assert "✗ further" in rows.first.inner_text()
    by_ratio = page.locator("#cases th[data-sort]", has_text="ratio")

    def ratios() -> list[float]:
        shown = page.locator("#cases td.ratio").all_inner_texts()
        return [-math.inf if text == "–" else float(text.split()[0]) for text in shown]

    for order, reverse in (("descending", True), ("ascending", False)):
        by_ratio.locator("button").click()
        assert by_ratio.get_attribute("aria-sort") == order
        assert ratios() == sorted(ratios(), reverse=reverse)
    page.fill("#filter", "layers.1.mlp")
    assert rows.count() == 9
    assert page.locator("#shown").inner_text() == "9 of 144"


@pytest.mark.parametrize(
    ("name", "scheme", "least"), [("bad", "light", 12), ("bad", "dark", 12), ("matrix", "dark", 8)]
)
def test_light_and_dark(browser: Browser, pages: Pages, name: str, scheme: str, least: int) -> None:
    """By the system's setting, and by the button."""
    opened = Opened(browser, pages(name), color_scheme=scheme)
    opened.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert_legible(opened.page, least)
    for _ in range(2):
        background = luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (background > 0.5) == (scheme == "light")
        for mark in (".marks.p1 .mark", ".marks.p2 .mark"):
            colour = opened.page.evaluate("mark => getComputedStyle(document.querySelector(mark)).borderTopColor", mark)
            card = opened.page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
            assert contrast(colour, card) >= SHAPES
        opened.page.click("#theme")
        scheme = {"light": "dark", "dark": "light"}[scheme]
    opened.close()


@pytest.mark.parametrize("name", ["bad", pytest.param("large", marks=pytest.mark.slow), "matrix"])
def test_narrow_and_wide_screens(browser: Browser, pages: Pages, name: str) -> None:
    """Wide tables scroll in their places; the page does not go aside, and plots keep a height and a width."""
    opened = Opened(browser, pages(name), viewport={"width": 360, "height": 800}, has_touch=True)
    page = opened.page
    for width in (360, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        for shown in ("true", "false"):
            page.evaluate(f"for (const each of document.querySelectorAll('details')) each.open = {shown}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        for area in page.locator(".area").all():
            box = area.bounding_box()
            assert box is not None
            assert box["width"] >= 240
            assert box["height"] >= 200
    page.set_viewport_size({"width": 360, "height": 800})
    page.locator(".area").first.tap()
    box = page.locator("#tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    page.locator("h1").tap()
    assert tip_of(page) == ""
    opened.close()


def test_colour_is_not_all_that_tells_programs_apart(page: Page) -> None:
    shapes = page.evaluate(
        """['.p1', '.p2'].map(program => {
          const mark = getComputedStyle(document.querySelector(`#layers .marks${program} .mark`));
          const line = getComputedStyle(document.querySelector(`#layers svg ${program} .line`));
          const bar = getComputedStyle(document.querySelector(`#ops .hbar${program} .track i`));
          return [mark.borderRadius, line.strokeDasharray, bar.backgroundImage === 'none'];
        })"""
    )
    assert all(one != other for one, other in zip(*shapes, strict=True))


def test_the_matrix_leads_to_its_reports(browser: Browser, pages: Pages) -> None:
    opened = Opened(browser, pages("matrix"))
    links = opened.page.locator("#matrix a").all()
    assert [each.inner_text() for each in links] == ["float16", "float16", "int4", "int4"]
    for each in links:
        assert (pages("matrix").parent / str(each.get_attribute("href"))).is_file()
    steps = opened.page.locator("#matrix th button", has_text="step, ms")
    steps.click()
    steps.click()
    numbers = opened.page.locator("#matrix tbody tr td:first-child").all_inner_texts()
    assert numbers == ["1", "3", "2", "4"]
    opened.close()
