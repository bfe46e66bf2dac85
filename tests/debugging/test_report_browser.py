"""The page in a real browser, headless: it can be read, whatever the light and the width, and its controls work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Opened, assert_legible, luminance, needs_browser
from playwright.sync_api import Browser, Page
from test_report_page import hostile_report

from moecompiler.debugging.report.model import make_report
from moecompiler.debugging.report.page import render
from moecompiler.pages.figures import duration, figure
from moecompiler.passes.pipelines import named_pipelines

pytestmark = [needs_browser, pytest.mark.xdist_group("debugging")]
PLUGINS = named_pipelines()["plugins"]


@pytest.fixture(scope="module")
def report_file(subject_of, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """The report of all passes of ``plugins`` on an export of the shipped model, with numbers."""
    made = make_report(subject_of("one-rank", tidy=False), PLUGINS, "tiny", "plugins")
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(made), encoding="utf-8")
    return path


@pytest.fixture
def wide(browser: Browser, report_file: Path) -> Iterator[Page]:
    opened = Opened(browser, report_file, viewport={"width": 1400, "height": 900}, color_scheme="light")
    yield opened.page
    opened.close()


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.text_content("#report-data") or "")


def test_the_timeline_is_that_of_the_data(wide: Page) -> None:
    data = data_of(wide)
    rows = wide.locator("#timeline tr[data-pass]")
    assert rows.count() == len(data["passes"]) == len(PLUGINS)
    for index, step in enumerate(data["passes"]):
        cells = [text.strip() for text in rows.nth(index).locator("th, td").all_inner_texts()]
        nodes = [step["nodes_before"], step["nodes_after"]]
        assert cells == [
            f"{step['index']:02} {step['name']}",
            duration(step["seconds"]),
            str(step["matches"]),
            " → ".join(str(count) for count in dict.fromkeys(nodes)),
            *(
                text
                for found in (step["before"], step["hf"])
                for text in (
                    figure(found["max_abs"]),
                    figure(found["relative"]),
                    f"{found['top1']:.2%}",
                    figure(found["kl"]),
                )
            ),
            "✓ ok",
        ]
    assert data["passed"]
    assert wide.locator(".tile b").all_inner_texts()[:4] == [
        "✓ within tolerance",
        str(len(PLUGINS)),
        str(data["matches"]),
        f"{data['nodes_before']} → {data['nodes_after']}",
    ]


# every picture: how many boxes, those that overlap, those whose text is wider, and those beyond its edge
PICTURES = """() => [...document.querySelectorAll('.canvas svg')].map(svg => {
  const edge = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('.op, .tensor')];
  const places = boxes.map(box => box.querySelector('path').getBoundingClientRect());
  const beside = (a, b) => a.right <= b.left + 0.5 || a.bottom <= b.top + 0.5;
  const apart = (a, b) => beside(a, b) || beside(b, a);
  const within = (a, b) => a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
  const named = (test) => boxes.filter((box, i) => test(box, places[i], i)).map(box => box.textContent);
  return {
    area: edge.width * edge.height,
    ops: svg.querySelectorAll('.op').length,
    overlapping: named((box, place, i) => places.some((other, j) => j < i && !apart(place, other))),
    spilling: named((box, place) => [...box.querySelectorAll('text')].some(
      text => text.getBoundingClientRect().width === 0 || !within(text.getBoundingClientRect(), place))),
    outside: named((box, place) => !within(place, edge)),
  };
})"""


def test_pictures_are_legible(wide: Page) -> None:
    data = data_of(wide)
    wide.click("#expand")
    pictures = wide.evaluate(PICTURES)
    drawn = [kind[side] for step in data["passes"] for kind in step["kinds"] for side in ("before", "after")]
    assert sorted(each["ops"] for each in pictures) == sorted(len(each["nodes"]) for each in drawn if each["nodes"])
    assert max(each["ops"] for each in pictures) > 40
    for each in pictures:
        assert each["area"] > 0
        assert each["overlapping"] == each["spilling"] == each["outside"] == []


def test_filter(wide: Page) -> None:
    data = data_of(wide)
    everything = [each for step in data["passes"] for kind in step["kinds"] for each in kind["rewrites"]]
    shown = wide.locator("#shown")
    assert shown.inner_text() == f"{len(everything)} rewrites of {data['kinds']} kinds"
    wide.fill("#filter", "Layers.2.MLP.experts/reducesum")
    assert shown.inner_text() == "1 rewrite of 1 kind"
    kind = wide.locator(".kind:visible")
    assert kind.count() == 1
    kind.locator("summary").first.click()
    assert kind.locator(".rewrite:visible").all_inner_texts()[0].split("\t")[1] == "model.layers.2.mlp.experts"
    assert wide.locator(".pass:visible").count() == 1
    wide.fill("#filter", "merge-qkv")
    assert shown.inner_text() == "4 rewrites of 1 kind"
    wide.fill("#filter", "no such thing")
    assert shown.inner_text() == "0 rewrites of 0 kinds"
    assert wide.locator(".pass:visible").count() == 0
    wide.fill("#filter", "")
    assert shown.inner_text() == f"{len(everything)} rewrites of {data['kinds']} kinds"


def test_keyboard_and_controls(wide: Page) -> None:
    wide.keyboard.press("Tab")
    assert wide.evaluate("document.activeElement.className") == "skip"
    assert wide.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    kind = wide.locator("#pass-6 .kind").first
    assert kind.locator("svg").first.is_hidden()
    kind.locator("summary").first.focus()
    wide.keyboard.press("Enter")
    assert kind.locator("svg").first.is_visible()
    wide.fill("#filter", "fuse-attention")
    whole = wide.locator(".kind:visible").first
    whole.locator("summary").first.click()
    canvas, fit = whole.locator(".canvas").first, whole.locator(".fit")
    scrolls = "canvas => canvas.scrollWidth > canvas.clientWidth + 1"
    assert canvas.evaluate(scrolls)
    wide.keyboard.press("Tab")
    assert wide.evaluate("document.activeElement.classList.contains('canvas')"), (
        "a picture is scrolled with the keyboard"
    )
    fit.click()
    assert not canvas.evaluate(scrolls)
    assert fit.get_attribute("aria-pressed") == "true"
    wide.click("#collapse")
    assert wide.locator(".canvas:visible").count() == 0
    wide.emulate_media(media="print")
    assert wide.locator("button:visible").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Browser, report_file: Path, scheme: str) -> None:
    """By the system's setting, and by the button."""
    opened = Opened(browser, report_file, color_scheme=scheme)
    page, other = opened.page, {"light": "dark", "dark": "light"}[scheme]
    page.click("#expand")
    backgrounds = []
    for expected in (scheme, other):
        assert_legible(page)
        backgrounds.append(luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert (backgrounds[-1] > 0.5) == (expected == "light")
        page.click("#theme")
    assert max(backgrounds) - min(backgrounds) > 0.8
    marks = page.evaluate(
        "[...document.querySelectorAll('.legend .op path')].map(p => [getComputedStyle(p).stroke, p.getAttribute('d')])"
    )
    assert len({stroke for stroke, _ in marks}) == len({shape for _, shape in marks}) == 4
    opened.close()


@pytest.mark.parametrize("width", [320, 375, 800])
def test_narrow_screens(browser: Browser, report_file: Path, width: int) -> None:
    """Pictures and long lists scroll in their places; the page does not go aside."""
    opened = Opened(browser, report_file, viewport={"width": width, "height": 800})
    page = opened.page
    for button in ("#collapse", "#expand"):
        page.click(button)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    row = page.locator("#timeline tr[data-pass]").first
    for cell in row.locator("td.n").all()[:3]:
        box = cell.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert width == 800 or box["x"] + box["width"] <= width
    opened.close()


def test_hostile_names(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(hostile_report()), encoding="utf-8")
    opened = Opened(browser, path)
    opened.page.click("#expand")
    assert "<script>alert(1)</script>" in opened.page.inner_text("h1")
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("svg:visible").count() > 2
    opened.close()
