"""The built pages: links lead somewhere, nothing comes from elsewhere, a browser shows them without trouble.

`tox -e docs` builds the pages and sets LION_DOCS_HTML to their folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(os.environ.get("LION_DOCS_HTML", ""))
pytestmark = pytest.mark.skipif(not os.environ.get("LION_DOCS_HTML"), reason="LION_DOCS_HTML names no built site")


class Page(HTMLParser):
    """The links, the resources and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        self.anchors.update(values[key] for key in ("id", "name") if key in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.resources.append(values["src"])
        elif tag == "link" and "href" in values and values.get("rel") not in ("canonical", "next", "prev"):
            self.resources.append(values["href"])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(SITE.resolve().rglob("*.html"))}


def test_pages_are_there(pages: dict[Path, Page]) -> None:
    names = {path.name for path in pages}
    assert {"index.html", "eight-bits.html", "lion.html", "troubleshooting.html", "search.html"} <= names


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links + page.resources:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.name}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.name}: {link} (no such anchor)")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    remote = [f"{path.name}: {r}" for path, page in pages.items() for r in page.resources if urlsplit(r).netloc]
    styles = [f"{p.name}" for p in SITE.rglob("*.css") if "@import" in p.read_text() or "url(http" in p.read_text()]
    assert not remote and not styles


# What is wider than its column or smaller than can be read, as the browser lays the page out. At the width of a screen
# nothing scrolls; on a phone, code and tables may.
LAYOUT = r"""
() => {
  const column = document.querySelector("article"), screen = innerWidth >= 1280, found = [];
  const right = column.parentElement.getBoundingClientRect().right + 1;
  const drawn = e => e.getClientRects().length > 0, words = e => e.textContent.trim().replace(/\s+/g, " ").slice(0, 40);
  for (const element of [...column.querySelectorAll("pre, table")].filter(drawn)) {
    let box = element;
    while (box !== column && !["auto", "scroll"].includes(getComputedStyle(box).overflowX)) box = box.parentElement;
    const cut = screen && box !== column ? box.scrollWidth - box.clientWidth : 0;
    const end = element.getBoundingClientRect().left + Math.max(element.offsetWidth, element.scrollWidth);
    const wide = Math.round(box === column ? end - right : cut);
    if (wide > 0) found.push(`${wide} pixels too wide: ${words(element)}`);
  }
  for (const text of [...column.querySelectorAll("svg text")].filter(t => drawn(t) && t.textContent.trim())) {
    const matrix = text.getScreenCTM();
    const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b);
    if (size < 9) found.push(`text of ${size.toFixed(1)} pixels: ${words(text)}`);
  }
  return found;
}
"""
# Sphinx makes these pages.
GENERATED = ("genindex", "py-modindex", "search")
# Old addresses, each with the page that it leads to.
FORWARDING = {"faq": "troubleshooting"}


def test_pictures_are_drawings(pages: dict[Path, Page]) -> None:
    # Text in them can be measured, and their colours follow the theme.
    written = [page for path, page in pages.items() if path.stem not in GENERATED]
    pictures = {Path(urlsplit(resource).path).name for page in written for resource in page.resources}
    assert not {name for name in pictures if name.endswith((".png", ".jpg", ".gif", ".webp"))}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    quiet = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as running:
        instance = running.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
        )
        yield instance
        instance.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(browser: Any, pages: dict[Path, Page], scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
    for path in pages:
        if "_modules" in path.parts or path.stem in FORWARDING:
            continue
        page.goto(path.as_uri())
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if beyond > 0:
            trouble.append(f"{path.name} is {beyond} pixels wider than the window")
        if path.stem not in GENERATED:
            trouble += [f"{path.name}: {found}" for found in page.evaluate(LAYOUT)]
        background, text = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
            ".map(c => c.match(/[0-9.]+/g).slice(0, 3).reduce((sum, x) => sum + +x, 0) / 3)"
        )
        if (background > text) is not (scheme == "light") or abs(background - text) < 120:
            trouble.append(f"{path.name}: {scheme} has a background of {background:.0f} and text of {text:.0f}")
    context.close()
    assert not trouble


def test_search_finds_a_page(browser: Any) -> None:
    page = browser.new_page()
    page.goto((SITE.resolve() / "search.html").as_uri() + "?q=percentile")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    assert "clipping" in page.inner_text("#search-results").lower()
    page.close()


def test_navigation_reaches_a_notebook(browser: Any) -> None:
    page = browser.new_context(viewport={"width": 390, "height": 900}).new_page()
    page.goto((SITE.resolve() / "index.html").as_uri())
    page.locator(".mobile-header label[for=__navigation]").click()
    page.locator(".sidebar-tree a", has_text="Notebooks").click()
    page.locator("article a", has_text="Eight bits are enough").first.click()
    assert page.url.endswith("notebooks/eight-bits.html")
    page.close()


def test_what_is_too_wide_or_too_small_would_be_noticed(browser: Any, tmp_path: Path) -> None:
    drawing = '<svg viewBox="0 0 100 20" width="50"><text y="15" font-size="12">tiny</text></svg>'
    line, cells = "<pre>" + "x" * 400 + "</pre>", "<table><tr>" + "<td>xxxxxxxx</td>" * 40 + "</tr></table>"
    scrolling = "<div style='overflow-x: auto'>"
    page_of = {
        "in a column": f"{line}{cells}{drawing}",
        "that scroll": f"{scrolling}{line}</div>{scrolling}{cells}</div>",
    }
    found = {}
    for name, body in page_of.items():
        (tmp_path / "page.html").write_text(f"<div style='width: 100%'><article>{body}</article></div>")
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((tmp_path / "page.html").as_uri())
            found[name, width] = len(page.evaluate(LAYOUT))
            page.close()
    assert found == {
        ("in a column", 390): 3,
        ("in a column", 1280): 3,
        ("that scroll", 390): 0,
        ("that scroll", 1280): 2,
    }


@pytest.mark.parametrize("old", FORWARDING)
def test_an_old_address_leads_to_the_page_that_took_over(browser: Any, old: str) -> None:
    page = browser.new_page()
    page.goto((SITE.resolve() / f"{old}.html").as_uri())
    page.wait_for_url(f"**/{FORWARDING[old]}.html", timeout=10_000)
    page.close()


def test_a_table_of_words_is_whole_on_a_phone_and_names_its_columns(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((SITE.resolve() / "migrating" / "adamw.html").as_uri())
    table = page.locator("table", has_text="warm-up")
    assert table.evaluate("table => table.parentElement.scrollWidth <= table.parentElement.clientWidth")
    cell = table.locator("td", has_text="nothing is divided")
    assert "why" in cell.evaluate("cell => getComputedStyle(cell, '::before').content")
    page.close()
