"""The report of a comparison that was really made, by the verb, of an engine with itself: in files, and in a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from browsing import Opened, assert_legible, needs_browser
from cli import Here

from moecompiler.comparison.result import Result

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHOWN = "() => [...document.querySelectorAll('[data-from]')].map(element => element.dataset.from)"


@needs_browser
def test_report(here: Here, engines: Callable[[str], Path], tmp_path: Path, browser: Browser) -> None:
    report, engine = tmp_path / "report", str(engines("one"))
    options = ("--level", "layer,model,routing", "--tokens", "24", "--prompts", "1", "--output_len", "4", "--no_replay")
    said = here("compare", engine, engine, *options, "--work_dir", str(tmp_path / "work"), "--output_dir", str(report))
    assert said.status == 0, said.err
    data = json.loads((report / "result.json").read_text())
    result = Result.from_json(data)
    opened = Opened(browser, report / "report.html", viewport={"width": 360, "height": 800})
    page = opened.page
    assert json.loads(page.text_content("#report-data") or "") == data
    shown = page.evaluate(SHOWN)
    assert result.layer
    assert result.model
    assert result.routing
    places = range(len(result.layer.places))
    for program in (0, 1):
        assert {f"/layer/programs/{program}/relative/{place}/0" for place in places} <= set(shown)
        assert {f"/model/programs/{program}/kl/{token}" for token in range(len(result.model.tokens))} <= set(shown)
    words = page.locator(".strip:visible .piece").all_text_contents()
    assert [each.replace("⏎", "") for each in words] == [token.text or "∅" for token in result.model.tokens]
    assert page.locator(".heat tbody tr").count() == 2 * len(result.routing.layers)
    assert "Not measured" in page.locator("#ops").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert_legible(page, 8)
    opened.close()
