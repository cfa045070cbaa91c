"""The page of `kd report` in a browser: silent, without a request, no barriers, wide and narrow, light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.base.files import write_text
from kdcli.report import make_report
from tests.report.helpers import EVIL_NAME, bench_file, settings

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the test extra has it)"
)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = [(1280, 900), (400, 800)]
THEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("KD_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium here; apt-get install chromium, or set KD_CHROMIUM")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


class Visit:
    """A page opened from its file, and all it said and asked for."""

    def __init__(self, browser: Any, path: Path, size: tuple[int, int], theme: str, **more: Any) -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=theme, **more
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def path(project: Path) -> Path:
    folders = [Path("runs/kd-1"), Path("runs") / EVIL_NAME, Path("runs/ce-1"), Path("runs/base")]
    target = project / "report.html"
    write_text(target, make_report(folders, settings(bench=bench_file(project))).html)
    return target


VIEWS = [(size, theme) for size in SIZES for theme in THEMES]


@pytest.mark.parametrize(
    ("size", "theme"), [*(pytest.param(*view, marks=pytest.mark.slow) for view in VIEWS[:-1]), VIEWS[-1]]
)
def test_page_has_no_errors_requests_or_accessibility_violations(
    browser: Any, path: Path, size: tuple[int, int], theme: str
) -> None:
    visit = Visit(browser, path, size, theme)
    try:
        page = visit.page
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")  # pictures are loaded when they are near
        page.wait_for_function("[...document.images].every((picture) => picture.naturalWidth > 0)")
        found = axe.Axe().run(page).response["violations"]
        serious = [problem for problem in found if problem["impact"] in ("serious", "critical")]
        assert not serious, [(problem["id"], problem["nodes"][0]["html"]) for problem in serious]
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert [url for url in visit.asked if not url.startswith("data:")] == [path.resolve().as_uri()]
        assert visit.said == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (theme == "dark")
        card = page.evaluate("getComputedStyle(document.querySelector('figure img')).backgroundColor")
        assert card == "rgb(255, 255, 255)"  # the figures' ink is dark in both themes
        if folder := os.environ.get("KD_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/report-{size[0]}-{theme}.png", full_page=True)
    finally:
        visit.close()


def column(page: Any, number: int) -> list[str]:
    script = "n => [...document.querySelector('table.sortable').tBodies[0].rows].map((row) => row.cells[n].innerText)"
    return [str(text).split("\n")[0] for text in page.evaluate(script, number)]


@pytest.mark.slow
def test_tables_are_sorted_by_keyboard(browser: Any, path: Path) -> None:
    visit = Visit(browser, path, SIZES[0], "light")
    try:
        page = visit.page
        button = page.locator("table.sortable").first.get_by_role("button", name="test accuracy")
        button.focus()
        page.keyboard.press("Enter")
        values = [float(text) for text in column(page, 1)]
        assert values == sorted(values, reverse=True)
        head = page.locator("table.sortable").first.locator("th[aria-sort]")
        assert head.get_attribute("aria-sort") == "descending"
        page.keyboard.press("Space")
        values = [float(text) for text in column(page, 1)]
        assert values == sorted(values)
        assert head.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Tab")  # agreement: a teacher has none, and what is missing comes last
        page.keyboard.press("Enter")
        texts = column(page, 2)
        missing = [text for text in texts if text == "—"]
        assert missing
        assert texts[-len(missing) :] == missing
        known = [float(text) for text in texts[: -len(missing)]]
        assert known == sorted(known, reverse=True)
        assert page.locator("table.sortable").first.locator("th[aria-sort]").count() == 1
    finally:
        visit.close()


@pytest.mark.slow
def test_page_without_scripts(browser: Any, path: Path) -> None:
    visit = Visit(browser, path, SIZES[0], "light", java_script_enabled=False)
    try:
        page = visit.page
        assert page.get_by_role("button").count() == 0
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the link that skips
        assert page.url.endswith("#main")
        assert page.get_by_role("heading", level=1).inner_text() == "Distillation report"
    finally:
        visit.close()


@pytest.mark.slow
def test_details_are_open_in_print(browser: Any, path: Path) -> None:
    visit = Visit(browser, path, SIZES[0], "dark")
    try:
        page = visit.page
        assert page.locator("details[open]").count() == 0
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details[open]").count() == 0
    finally:
        visit.close()
