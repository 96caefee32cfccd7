"""Pages in a real browser: what is folded opens, search finds, dark is dark, keys work; nothing is loaded or cut.

`pip install 'reattend[browser]'` and a chromium; without nbconvert only the executed notebook is left out.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'reattend[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path, and CHROMIUM does not name one"),
]


CELL = """
import torch
from small_models import stack
import reattend
recipe = {"version": 1, "sites": [{"match": {"layer": "0-15"}, "attention": {"window": {"window": 4}}},
                                  {"match": {"layer": "16"}, "attention": "agent"}]}
fast = reattend.optimize(stack(32), recipe, (torch.randn(2, 9, 32),), measure=False, name="32 layers")
fast.report
"""
AROUND = "<!doctype html><meta charset=utf-8><style>table{color:red}</style><main><h1>Beside</h1>%s</main>"
PAGES = ("page", "inside", "notebook")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Path]:
    """The report as a page, and among other people's elements and styles."""
    space: dict[str, Any] = {}
    exec(CELL, space)
    report = space["fast"].report
    (folder / "inside.html").write_text(AROUND % report._repr_html_(), encoding="utf-8")
    return {"page": report.write(folder / "page.html"), "inside": folder / "inside.html"}


@pytest.fixture(scope="module")
def notebook_page(folder: Path) -> Path:
    """A notebook that a kernel has run, as nbconvert writes it, without what that would load from elsewhere."""
    told = "no nbconvert, nbclient or ipykernel: pip install 'reattend[browser]'"
    nbconvert, nbclient, nbformat, _ = (
        pytest.importorskip(n, reason=told) for n in ("nbconvert", "nbclient", "nbformat", "ipykernel")
    )
    cells = [nbformat.v4.new_markdown_cell("# A swap"), nbformat.v4.new_code_cell(CELL)]
    book = nbformat.v4.new_notebook(cells=cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        nbclient.NotebookClient(book, kernel_name="python3").execute()
    elsewhere = ("mathjax_url", "require_js_url", "jquery_url", "mermaid_js_url", "widget_renderer_url")
    page, _ = nbconvert.HTMLExporter(**dict.fromkeys(elsewhere, "")).from_notebook_node(book)
    (folder / "notebook.html").write_text(page, encoding="utf-8")
    return folder / "notebook.html"


@pytest.fixture
def path(request: pytest.FixtureRequest, name: str) -> Path:
    """The page of a name; only the notebook needs nbconvert."""
    return request.getfixturevalue("notebook_page") if name == "notebook" else request.getfixturevalue("alone")[name]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def shown(self, selector: str) -> int:
        return sum(1 for place in self.page.query_selector_all(selector) if place.is_visible())

    def style(self, selector: str, name: str) -> str:
        told: str = self.page.eval_on_selector(selector, "(e, name) => getComputedStyle(e)[name]", name)
        return told


@pytest.fixture(params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    found = Opened(browser, path)
    yield found
    assert found.said == [] and [url for url in found.asked if not url.startswith((path.as_uri(), "data:"))] == []
    found.page.close()


def test_what_is_folded_opens(opened: Opened) -> None:
    assert opened.shown(".site .card") == 0 and opened.shown(".operations") == 0
    opened.page.click("#graph > summary")
    for path in ("layers", "0", "attn"):
        opened.page.locator(
            "#graph .module > summary:visible", has=opened.page.get_by_text(path, exact=True)
        ).first.click()
    assert opened.page.locator(".operations .changed:visible").count() > 0


def test_a_link_opens_the_card_of_its_site(opened: Opened) -> None:
    opened.page.click(".layers tr:nth-child(3) .path a")
    assert opened.page.locator("#site-2 .card").is_visible() and opened.shown("#site-2 .mask") == 2
    opened.page.click("#site-2 figure:last-child a")
    assert opened.page.locator("#computations .site[open] pre").first.is_visible()


def test_search_finds_a_site(opened: Opened) -> None:
    opened.page.fill("[data-search]", "layers.7.")
    assert opened.shown(".layers tbody tr") == 1
    opened.page.fill("[data-search]", "noncausal")
    assert opened.shown(".layers tbody tr") == 1, "reasons are searched as well"
    opened.page.fill("[data-search]", "nowhere")
    assert opened.shown(".layers tbody tr") == 0 and opened.page.locator("[data-empty]").is_visible()


def test_dark_is_dark(opened: Opened, browser: Any, path: Path) -> None:
    light = opened.style(".reattend", "backgroundColor")
    opened.page.click("[data-theme-button]")
    dark = opened.style(".reattend", "backgroundColor")
    assert light != dark
    opened.page.click("[data-theme-button]")
    assert opened.style(".reattend", "backgroundColor") == light
    preferred = Opened(browser, path, scheme="dark")
    assert preferred.style(".reattend", "backgroundColor") == dark
    preferred.page.close()


def test_it_is_used_by_keys_alone(opened: Opened) -> None:
    keys = opened.page.keyboard
    opened.page.focus(".reattend")
    keys.press("/")
    keys.type("layers.7.")
    assert opened.shown(".layers tbody tr") == 1
    keys.press("Escape")
    assert opened.shown(".layers tbody tr") == 32
    opened.page.focus(".path a")
    keys.press("j")
    keys.press("Enter")
    assert opened.page.locator("#cards[open]").count() == 1
    keys.press("j")
    keys.press("Enter")
    assert opened.page.locator("#site-0 .card").is_visible()
    keys.press("k")
    keys.press("Enter")
    assert opened.page.locator("#cards[open]").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_or_overlaps(browser: Any, path: Path, width: int) -> None:
    opened = Opened(browser, path, width)
    opened.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.page.evaluate(OUTSIDE, width) == []
    assert opened.page.evaluate(OVERLAPS) == []
    opened.page.close()


OUTSIDE = """(width) => [...document.querySelectorAll(".reattend :is(h1, h2, p, dd, dt, td, li, summary)")]
  .filter((e) => e.checkVisibility() && !e.closest("figure, pre, math, dl.formulas"))
  .filter((e) => e.getBoundingClientRect().right > width + 1).map((e) => e.textContent.slice(0, 60))"""
OVERLAPS = """() => [...document.querySelectorAll(".layers tr")].slice(0, 4).flatMap((row) => {
  const shown = [...row.querySelectorAll("td")].filter((e) => e.checkVisibility());
  const boxes = shown.map((e) => e.getBoundingClientRect());
  return boxes.flatMap((a, n) => boxes.slice(n + 1).filter((b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1));
})"""


def test_it_opens_in_less_than_two_seconds(browser: Any, path: Path) -> None:
    opened = Opened(browser, path)
    timing = opened.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert timing < 2000
    opened.page.close()


def test_a_table_looks_alike_everywhere(opened: Opened) -> None:
    """A notebook aligns its own tables to the right, stripes them, and lets the terms of a list float."""
    opened.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    rows = {opened.style(f".layers tbody tr:nth-child({n})", "backgroundColor") for n in (1, 2)}
    assert rows == {"rgba(0, 0, 0, 0)"} and opened.style(".layers td.path", "textAlign") == "left"
    term = ".card dl.facts dt"
    assert opened.style(term, "float") == "none"
    assert opened.page.eval_on_selector(term, "e => e.getBoundingClientRect().width") > 80


def test_another_elements_styles_stay_outside(browser: Any, alone: dict[str, Path]) -> None:
    opened = Opened(browser, alone["inside"])
    assert opened.style("main > h1", "fontSize") == "32px", "the report's own h1 is smaller"
    opened.page.close()
