"""What a reader's browser meets: no other hosts, no errors, accessible, readable on a phone, and every slider works."""

import re
import tomllib
from functools import cache
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
from browsing import PAGES, Visit, visit
from bs4 import BeautifulSoup

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[2]
CHAPTERS = [name for name in PAGES if re.match(r"nbs/\d\d_", name)]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
LEFTOVERS = re.compile(r"\{(glue|cite|eq|ref|py|numref|doc)\b[^}]*\}|:::|```|^#\s*\|", re.M)
FRAME = "[...root.querySelectorAll('.frame')].findIndex(f => !f.hidden)"


@cache
def soup(path: Path) -> BeautifulSoup:
    """A file of the site, parsed."""
    return BeautifulSoup(path.read_text(), "html.parser")


@cache
def ids(path: Path) -> list[str]:
    """All ids of a page."""
    return [tag["id"] for tag in soup(path).select("[id]")]


def test_no_other_host(page: Visit):
    """Nothing is asked of another host."""
    assert not page.foreign


def test_no_errors(page: Visit):
    """The console and the scripts are silent."""
    assert not page.errors


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(page: Visit, theme: str, axe: str):
    """axe-core finds nothing, with hints, solutions and folded code open."""
    tab = page.unfold()
    tab.emulate_media(color_scheme=theme, reduced_motion="reduce")
    tab.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
    tab.evaluate(axe)
    tab.wait_for_timeout(300)  # colours fade into each other
    found = tab.evaluate("rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})", RULES)["violations"]
    tab.emulate_media(color_scheme="light")
    report = [f"{v['id']} ({len(v['nodes'])}×): {' '.join(map(str, n['target']))} | {n['html'][:160]} | {n['failureSummary']}" for v in found for n in v["nodes"][:3]]
    assert not found, "\n".join(report)


def test_fits_a_phone(page: Visit):
    """No horizontal scrolling at 375 pixels, with everything unfolded."""
    tab = page.unfold()
    tab.set_viewport_size({"width": 375, "height": 812})
    try:
        wide = tab.evaluate("""() => document.scrollingElement.scrollWidth <= document.documentElement.clientWidth ? [] :
            [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map(e => e.outerHTML.slice(0, 160))""")
        assert tab.evaluate("document.scrollingElement.scrollWidth <= document.documentElement.clientWidth"), wide
    finally:
        tab.set_viewport_size({"width": 1280, "height": 900})


def test_pictures_have_words(page: Visit):
    """Each picture says what it shows, hidden frames included."""
    silent = page.tab.evaluate("""() => [...document.querySelectorAll('main img, main svg[role=img], .figure svg')]
        .filter(e => !(e.getAttribute('alt') ?? e.getAttribute('aria-label') ?? '').trim()).map(e => e.outerHTML.slice(0, 160))""")
    assert not silent


def test_ids_are_unique(site: Path, page: Visit):
    """No id stands twice on a page, so that links and figures refer to one thing."""
    found = ids(site / page.name)
    assert not {i for i in found if found.count(i) > 1}


def test_links(site: Path, page: Visit):
    """Every internal link and source leads to a file that exists, and to an id in it."""
    file, broken = site / page.name, []
    for tag in soup(file).select("[href], [src]"):
        link = tag.get("href") or tag.get("src") or ""
        target, fragment = urldefrag(link)
        if tag.name == "use" or urlsplit(link).scheme or link.startswith("//") or link == "#":
            continue
        there = (file.parent / unquote(target.partition("?")[0])).resolve() if target else file
        there = there / "index.html" if there.is_dir() else there
        if not there.is_file() or (fragment and there.suffix == ".html" and unquote(fragment) not in ids(there)):
            broken.append(link)
    assert not broken


def test_mathematics(page: Visit):
    """Every formula is typeset, none with an error."""
    left = page.tab.evaluate("() => [...document.querySelectorAll('main .math')].filter(e => !e.querySelector('mjx-container')).map(e => e.outerHTML.slice(0, 120))")
    assert not left
    wrong = page.tab.evaluate("() => [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.getAttribute('data-mjx-error') ?? e.textContent)")
    assert not wrong


def test_no_leftover_markup(page: Visit):
    """No MyST syntax or directive line reached the reader."""
    text = page.tab.evaluate("""() => { const body = document.querySelector('article')?.cloneNode(true);
        body?.querySelectorAll('pre, code, script, style').forEach(e => e.remove()); return body?.textContent ?? ''; }""")
    assert not [m.group() for m in LEFTOVERS.finditer(text)]
    cells = page.tab.evaluate("() => [...document.querySelectorAll('.cell_input')].map(e => e.textContent)")
    assert not [c for c in cells if re.search(r"^\s*#\s*\|", c, re.M)]


def test_no_traceback(page: Visit):
    """No output is a traceback or a warning on standard error."""
    assert page.tab.locator(".output.traceback, .output.stderr").count() == 0
    assert "Traceback (most recent call last)" not in page.tab.locator("main").inner_text()


def test_sliders(page: Visit):
    """Each slider over frames moves its picture, by keyboard and by mouse."""
    tab = page.unfold()
    for scrubber in tab.locator(".scrubber").all():
        for slider in scrubber.locator("input[type=range]").all():
            move_by_keyboard(slider, lambda: scrubber.evaluate(f"root => {FRAME}"), scrubber.locator(".frame:visible"))
            box = slider.bounding_box()
            slider.press("Home")
            before = scrubber.evaluate(f"root => {FRAME}")
            drag(tab, (box["x"] + 6, box["y"] + box["height"] / 2), (box["x"] + box["width"] - 6, box["y"] + box["height"] / 2))
            assert scrubber.evaluate(f"root => {FRAME}") != before, "dragging does not move the picture"


def test_play(page: Visit):
    """Each Play button runs to the last frame and stops."""
    for button in page.unfold().locator(".scrubber button").all():
        slider = button.locator("xpath=ancestor::*[contains(@class, 'scrubber')]").locator("input[type=range]")
        for key in ("End", "ArrowLeft", "ArrowLeft"):
            slider.press(key)
        before = slider.input_value()
        button.click()
        page.tab.wait_for_function("([s, b]) => s.value === s.max && b.textContent === 'Play'", arg=[slider.element_handle(), button.element_handle()], timeout=5000)
        assert slider.input_value() != before


def test_widgets(page: Visit):
    """Each slider of ipywidgets moves its picture too."""
    tab = page.unfold()
    for handle in tab.locator(".noUi-handle").all():
        output = handle.locator("xpath=ancestor::*[contains(@class, 'cell_output')]")
        move_by_keyboard(handle, lambda: handle.get_attribute("aria-valuenow"), output)
        handle.press("Home")
        before, box, rail = handle.get_attribute("aria-valuenow"), handle.bounding_box(), handle.locator("xpath=ancestor::*[contains(@class, 'noUi-target')]").bounding_box()
        drag(tab, (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), (rail["x"] + rail["width"], rail["y"] + rail["height"] / 2))
        assert handle.get_attribute("aria-valuenow") != before, "dragging does not move the slider"


def move_by_keyboard(slider, state, picture):
    """Arrow keys change the state and bring it back; the first and the last picture differ."""
    slider.press("Home")
    first, seen = state(), fingerprint(picture)
    slider.press("ArrowRight")
    assert state() != first, "→ does not move the picture"
    slider.press("ArrowLeft")
    assert state() == first, "← does not bring it back"
    slider.press("End")
    assert fingerprint(picture) != seen, "the first and the last picture are the same"


def fingerprint(locator) -> str:
    """A hash of what is seen."""
    return sha256(locator.screenshot()).hexdigest()


def drag(tab, start, end):
    """Press the mouse at one point and let go at another."""
    tab.mouse.move(*start)
    tab.mouse.down()
    tab.mouse.move(*end, steps=5)
    tab.mouse.up()


@pytest.mark.parametrize("name", CHAPTERS or ["no site"])
def test_chapter(site: Path, name: str):
    """A chapter has its buttons, and every cell that should have run did."""
    links = [a["href"] for a in soup(site / name).select(".article-header-buttons a[href]")]
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    stem = Path(name).stem
    colab = repository.replace("https://github.com/", "https://colab.research.google.com/github/") + f"/blob/colab/{stem}.ipynb"
    assert colab in links
    assert any(link.endswith(f"_sources/nbs/{stem}.ipynb") for link in links), "no download button"
    assert any(link.startswith(f"{repository}/blob/main/nbs/{stem}.ipynb") for link in links), "no source button"
    executed = nbformat.read(site.parent / "jupyter_execute" / "nbs" / f"{stem}.ipynb", as_version=4)
    cells = [c for c in executed.cells if c.cell_type == "code" and c.source.strip() and "skip-execution" not in c.metadata.get("tags", [])]
    left = [c.source for c in cells if c.execution_count is None]
    assert not left or len(left) == len(cells), left  # a page made from the cache of an earlier build has no counts at all
    assert soup(site / name).select(".cell_output")


def test_home(browser, address: str):
    """The address of the site leads to the preface."""
    tab = browser.new_page()
    tab.goto(address)
    tab.wait_for_url("**/book/*.html")
    assert tab.title()
    tab.close()


def test_search(browser, address: str):
    """The search finds something, without a server."""
    seen = visit(browser, address, "search.html?q=picture")
    seen.tab.locator("#search-results li").first.wait_for(timeout=10_000)
    assert not seen.foreign and not seen.errors
    seen.tab.close()


def test_from_a_file(browser, site: Path):
    """A chapter opened from the disk has its mathematics and a slider that works."""
    name = next(n for n in CHAPTERS if soup(site / n).select(".scrubber input") and soup(site / n).select(".math"))
    seen = visit(browser, "file://", f"{site}/{name}")
    assert not seen.foreign
    assert seen.tab.locator("mjx-container").count()
    scrubber = seen.unfold().locator(".scrubber").first
    slider = scrubber.locator("input[type=range]").first
    slider.press("Home")
    before = scrubber.evaluate(f"root => {FRAME}")
    slider.press("ArrowRight")
    assert scrubber.evaluate(f"root => {FRAME}") != before
    seen.tab.close()
