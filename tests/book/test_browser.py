"""The built book in a real browser: it typesets, fits, answers and is accessible, offline."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.book.site import ROOT, SITE, pages
from tools.browser import find

pytestmark = [pytest.mark.site, pytest.mark.browser]

AXE = ROOT / "tests" / "vendor" / "axe.min.js"
FLAGS = ["--disable-gpu", "--disable-quic", "--disable-background-networking"]
# one page of each template; the accessibility check is slow
TEMPLATES = (
    "book/index",
    "book/ledger",
    "book/api",
    "book/bibliography",
    "chapters/4-3/1-definitions",
)
# what the toolchain's own elements do, each by rule and by what marks the element: labels of the
# theme's buttons and of folded cells that differ from their text, the roles of a bibliography
TOOLCHAINS_OWN = {
    "label-content-name-mismatch": ("pst-js-only", '<summary aria-label="Toggle hidden content">'),
    "aria-required-children": ('<div role="list" class="citation-list">',),
}
CONTENT = [
    path.relative_to(SITE).with_suffix("").as_posix()
    for folder in ("book", "chapters")
    for path in sorted((SITE / folder).rglob("*.html"))
]


def changed() -> set[str]:
    """Pages whose source is not that of the commit before last; none where git cannot tell."""
    command = ["git", "diff", "--name-only", "HEAD~1", "--", "book", "chapters"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sources = done.stdout.split() if done.returncode == 0 else []
    return {source.rpartition(".")[0] for source in sources} & set(CONTENT)


@pytest.fixture(scope="module")
def browser():
    executable = find()
    if executable is None:
        reason = "no Chromium is installed; set LMLOSSES_CHROMIUM or install the package chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not start for root
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=flags)


def opened(browser, name, *, width=1300, scheme="light"):
    """A page of the book, opened from the file system in a fresh profile."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.add_init_script(f"localStorage.mode = localStorage.theme = {scheme!r}")
    page.goto(Path(SITE, f"{name}.html").as_uri(), wait_until="load")
    page.wait_for_function("!window.MathJax || window.MathJax.startup?.promise !== undefined")
    page.evaluate("() => window.MathJax?.startup?.promise")
    return page


def test_there_are_pages_to_open():
    assert len(CONTENT) >= 12 and pages()


@pytest.mark.parametrize("name", CONTENT)
def test_page_typesets_fits_a_phone_and_asks_for_nothing_outside(browser, name):
    page = opened(browser, name, width=390)
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    broken = page.evaluate(
        "[...document.querySelectorAll('mjx-merror, mjx-mtext[style*=red]')].map(n => n.innerText)"
    )
    assert broken == []
    assert page.evaluate(
        "[...document.querySelectorAll('.math')].every(n => n.querySelector('mjx-container'))"
    )
    # wide equations, tables and code scroll by themselves; the page must not
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", sorted({*TEMPLATES, *changed()}))
def test_axe_finds_no_serious_violation_but_the_toolchains_own(browser, name, scheme):
    page = opened(browser, name, scheme=scheme)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
        ".then(r => r.violations.map(v => [v.id, v.impact, v.nodes.map(n => n.html)]))"
    )
    ours = [
        (rule, html[:200])
        for rule, impact, elements in found
        if impact in ("serious", "critical")
        for html in elements
        if not any(mark in html for mark in TOOLCHAINS_OWN.get(rule, ()))
    ]
    assert ours == []
    page.context.close()


@pytest.mark.parametrize("name", [name for name in CONTENT if name.startswith("chapters/")])
def test_every_slider_on_the_page_moves_by_keyboard_and_changes_its_figure(browser, name):
    page = opened(browser, name)
    for slider in page.query_selector_all(".slider"):
        frames = slider.query_selector_all(".slider-frame")
        assert len(frames) >= 10
        pictures = {frame.query_selector("svg").inner_html() for frame in frames}
        assert len(pictures) == len(frames), "two settings show the same figure"
        knob, output = slider.query_selector("input"), slider.query_selector("output")
        start, before = int(knob.get_attribute("value")), output.inner_text()
        assert frames[start].is_visible()
        knob.focus()
        knob.press("ArrowRight" if start + 1 < len(frames) else "ArrowLeft")
        visible = [position for position, frame in enumerate(frames) if frame.is_visible()]
        assert len(visible) == 1 and visible[0] != start
        assert output.inner_text() != before
    page.context.close()


def test_a_chapter_has_a_figure_that_moves():
    assert any('class="slider"' in Path(SITE, f"{name}.html").read_text() for name in CONTENT)


@pytest.mark.parametrize("name", ["book/ledger", "book/errata"])
def test_entries_can_be_filtered_by_verdict(browser, name):
    page = opened(browser, name)
    total = len(page.query_selector_all(".ledger-entry"))
    page.click(".ledger-filter button[value=wrong]")
    visible = [entry for entry in page.query_selector_all(".ledger-entry") if entry.is_visible()]
    assert 0 < len(visible) < total
    assert all("ledger-wrong" in entry.get_attribute("class") for entry in visible)
    page.click(".ledger-filter button[value=wrong]")
    assert all(entry.is_visible() for entry in page.query_selector_all(".ledger-entry"))
    page.context.close()


def test_a_solution_opens_at_a_click(browser):
    page = opened(browser, "chapters/4-3/1-definitions")
    solution = page.query_selector(".solution.dropdown, .solution details, div.solution")
    code = solution.query_selector("pre")
    assert not code.is_visible()
    (solution.query_selector("button, summary")).click()
    code.wait_for_element_state("visible")
    page.context.close()
