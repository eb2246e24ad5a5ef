"""A real browser opens the report: it asks for nothing, complains of nothing, and fits narrow and wide windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lightning.reporting.report import read_run, write_comparison, write_report
from tests.reporting.chromium import Chromium, find_chromium
from tests.reporting.report_runs import write_run

PROGRAM = find_chromium()


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install chromium, or set CHROMIUM=PROGRAM")
def test_a_browser_opens_the_pages(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, layers=4, experts=8, bits=4)) for name in ("one", "two")]
    pages = [write_report(runs[0]), write_comparison(runs, tmp_path / "comparison.html")]
    assert PROGRAM is not None
    for page in pages:
        with Chromium(PROGRAM, tmp_path / f"profile-{page.stem}") as browser:
            browser.open(page)
            assert browser.requests() == [page.resolve().as_uri()]
            assert browser.complaints() == []
            assert browser.value("document.images.length") == page.read_text().count("<img")
            assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
            assert browser.value("document.querySelector('h1').getBoundingClientRect().height") > 0
            browser.value("document.querySelectorAll('details').forEach(part => { part.open = true })")
            for width in (400, 1400):
                browser.call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
                )
                # Nothing but the boxes of tables and code is wider than the window.
                assert browser.value("document.documentElement.scrollWidth") <= width


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install chromium, or set CHROMIUM=PROGRAM")
def test_the_browser_would_notice(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><img src="missing.png"><script>console.log("hello")</script>')
    assert PROGRAM is not None
    with Chromium(PROGRAM, tmp_path / "profile") as browser:
        browser.open(page)
        assert any(url.endswith("missing.png") for url in browser.requests())
        assert any("hello" in complaint for complaint in browser.complaints())
